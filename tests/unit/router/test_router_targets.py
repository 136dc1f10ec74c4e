"""Where Prometheus is told to scrape, while the directory does not answer."""

import asyncio
from collections.abc import Sequence

import pytest

from router.targets import Target, Targets

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

OWN = Target(["10.0.0.1:9464"], {"role": "decode"})
OTHER = Target(["10.0.0.2:9464"], {"ingress": "ingress-0"})


class Slow:
    """A directory that takes `takes_s` to answer, or fails."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s, self.asked, self.fails = takes_s, 0, False

    async def targets(self) -> Sequence[Target]:
        self.asked += 1
        await asyncio.sleep(self.takes_s)
        if self.fails:
            raise OSError("the directory is gone")
        return [OTHER]


async def test_all_who_ask_at_once_are_answered_by_one_question() -> None:
    """And whoever asks later by another."""
    directory = Slow(1.0)
    targets = Targets(directory)
    found = await asyncio.gather(*(targets.with_others([OWN]) for _ in range(50)))
    assert found == [[OWN, OTHER]] * 50
    assert directory.asked == 1
    assert await targets.with_others([]) == [OTHER]
    assert directory.asked == 2


async def test_a_directory_that_hangs_is_asked_once_and_holds_nobody_up() -> None:
    """What was known last is told, or that nothing is; its answer counts whenever it comes."""
    directory = Slow(9.0)
    targets = Targets(directory)
    loop = asyncio.get_running_loop()
    for _ in range(4):
        began_s = loop.time()
        assert await targets.with_others([OWN]) is None
        assert loop.time() - began_s == pytest.approx(2.0)
    assert directory.asked == 1
    assert await targets.with_others([OWN]) == [OWN, OTHER]
    assert directory.asked == 1


async def test_who_no_longer_waits_ends_nobody_else_s_question() -> None:
    """A client that goes away while the directory is asked."""
    targets = Targets(Slow(1.0))
    first = asyncio.create_task(targets.with_others([OWN]))
    second = asyncio.create_task(targets.with_others([OWN]))
    await asyncio.sleep(0.5)
    first.cancel()
    assert await second == [OWN, OTHER]


async def test_a_directory_that_fails_takes_nothing_away() -> None:
    """And answers again once it does not."""
    directory = Slow(0.1)
    targets = Targets(directory)
    assert await targets.with_others([]) == [OTHER]
    directory.fails = True
    assert await targets.with_others([OWN]) == [OWN, OTHER]
    directory.fails = False
    assert await targets.with_others([]) == [OTHER]
