"""Curves that follow what requests took, and plans that follow the curves."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from kv.curve import LinkCurve
from kv.plan import Shape
from router.audit import Record
from tests.sim.world import COSTS, World, request, world
from workers.messages import Role
from workers.sim import SimCosts

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

# 1,000 tokens: 0.14 s over this link, 0.52 s to compute.
LINKED = replace(COSTS, link=LinkCurve(0.005, 3e-9))
TENTH = replace(COSTS, link=LinkCurve(0.005, 3e-8))


class Asker:
    """Sends prompts of 1,000 tokens that nobody has seen, one at a time, to idle replicas."""

    def __init__(self, here: World) -> None:
        self._here, self._sent = here, 0

    async def next(self, tokens: int = 1000) -> Record:
        self._sent += 1
        await asyncio.sleep(0.5)  # until replicas have told that they are idle
        start = 10_000 * self._sent
        await self._here.ask(request(f"r{self._sent}", range(start, start + tokens), 2))
        return self._here.audit.records[-1]

    async def until(self, true: Callable[[Record], bool], most: int) -> int:
        """How many requests it took."""
        for number in range(1, most + 1):
            if true(await self.next()):
                return number
        raise AssertionError(f"not within {most} requests")


def is_remote(record: Record) -> bool:
    return record.plan.shape is Shape.REMOTE


async def test_a_record_tells_where_its_seconds_went() -> None:
    """P's and D's add up to the time to the first token, but for the wires between."""
    async with world(prefill=1, decode=1, costs=LINKED) as here:
        record = await Asker(here).next()
        assert is_remote(record)
        computed, loaded = record.prefill_spent, record.decode_spent
        assert computed is not None
        assert loaded is not None
        assert computed.computing_s == pytest.approx(LINKED.prefill.seconds(1000, 0))
        assert loaded.loaded_bytes == 1000 * 46_080
        assert loaded.loading_s == pytest.approx(LINKED.link.seconds(loaded.loaded_bytes))
        told = (computed, loaded)
        spent_s = sum(s.queued_s + s.loading_s + s.computing_s for s in told)
        assert record.ttft_s == pytest.approx(spent_s, abs=0.005)


async def test_a_link_that_becomes_ten_times_slower_is_left_within_five_requests() -> None:
    """And used again within twenty after it has recovered, while nothing else shows that."""
    async with world(prefill=1, decode=1, costs=LINKED) as here:
        asker = Asker(here)
        for _ in range(30):
            assert is_remote(await asker.next())
        here.engine("decode-0").become(TENTH)
        assert await asker.until(lambda record: not is_remote(record), 6) <= 5
        here.check_rows()
        here.engine("decode-0").become(LINKED)
        assert await asker.until(is_remote, 20) > 1
        for _ in range(5):
            assert is_remote(await asker.next())
        await here.quiet()
        here.check()


async def test_a_link_that_stays_slow_is_seldom_tried() -> None:
    """A trial that fails makes the next one later."""
    async with world(prefill=1, decode=1, costs=LINKED) as here:
        asker = Asker(here)
        here.engine("decode-0").become(TENTH)
        tried = [is_remote(await asker.next()) for _ in range(300)]
        assert sum(tried[:10]) <= 5
        assert sum(tried[10:]) <= 10


@pytest.mark.parametrize("factor", [0.5, 2.0])
async def test_a_probe_that_was_wrong_is_mended_within_a_handful_of_requests(factor: float) -> None:
    """Timed on busy cores, or before others were: predictions are right after five."""
    async with world(prefill=0, decode=1) as here:
        here.engine("decode-0").crash()
        samples = tuple(
            (new, cached, factor * COSTS.prefill.seconds(new, cached))
            for new, cached in ((32, 0), (512, 0), (2048, 0))
        )
        here.start("decode-0", Role.DECODE, epoch="2", prefill_samples=samples)
        await here.warmed()
        asker = Asker(here)
        first = await asker.next()
        assert first.plan.predicted_ttft_s == pytest.approx(factor * (first.ttft_s or 0.0), rel=0.2)
        for tokens in (300, 1200, 700, 90):
            await asker.next(tokens)
        for tokens in (1000, 250, 2500):
            record = await asker.next(tokens)
            assert record.plan.predicted_ttft_s == pytest.approx(record.ttft_s, rel=0.2)


async def test_a_replica_that_becomes_slow_gets_less() -> None:
    """Of two like ones, one is slowed: requests go to the other after a few."""
    slow: SimCosts = replace(
        COSTS,
        prefill=replace(COSTS.prefill, per_token_s=10 * COSTS.prefill.per_token_s),
    )
    async with world(prefill=0, decode=2) as here:
        asker = Asker(here)
        for _ in range(6):
            await asker.next()
        here.engine("decode-0").become(slow)
        chosen = [(await asker.next()).plan.decode for _ in range(20)]
        assert chosen.count("decode-0") <= 6
        assert chosen[-3:] == ["decode-1"] * 3
        await here.quiet()
        here.check_rows()
