"""The audit of a simulated cluster: true of each request, and enough to run it again."""

import asyncio
import random
from collections.abc import Iterable

import pytest

from kv.audit import Entry, encode, read
from kv.plan import Shape
from router.audit import Footprint, Record
from router.entry import Scribe
from router.pseudonyms import Pseudonyms
from tests.sim.world import Prompts, answer, request, world

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


class NotingLog:
    """Writes each closed record down at once, as lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._scribe = Scribe(Pseudonyms(b"secret"), "model", lambda: 0.0, lambda: 0.0)

    def add(self, record: Record, footprint: Footprint) -> None:
        self.lines.append(encode(self._scribe.entry(record, footprint)))

    def entries(self) -> list[Entry]:
        return list(read(self.lines, lambda bad: pytest.fail(str(bad))))


async def test_every_request_leaves_one_true_line() -> None:
    """Sources add up to the prompt, parts end where they should, and answers are counted."""
    log, prompts = NotingLog(), Prompts(random.Random(5))
    async with world(log=log) as here:
        asked = [prompts.next(f"r{number}") for number in range(60)]
        for each in asked:
            await here.ask(each)
    entries = log.entries()
    assert [entry.request_id for entry in entries] == [each.request_id for each in asked]
    assert {entry.plan.shape for entry in entries} == {Shape.LOCAL, Shape.REMOTE}
    for each, entry in zip(asked, entries, strict=True):
        assert entry.asked.prompt_tokens == each.prompt_tokens
        assert entry.answer_tokens == len(answer(each))
        computes = "decode" if entry.plan.prefill is None else "prefill"
        assert sum(entry.sources[computes].values()) == each.prompt_tokens
        assert entry.plan.parts[-1].end_s == pytest.approx(entry.plan.predicted_ttft_s)
        assert entry.ttft_s is not None
        decided_s = entry.plans[-1].after_s
        assert entry.parts[-1].end_s == pytest.approx(entry.ttft_s - decided_s)
        received = entry.sources["decode"].get("received", 0)
        assert (entry.moved_bytes != {}) == (received > 0)


async def test_plans_that_failed_are_in_the_line() -> None:
    """A prefill replica that dies under a request: both plans, and when the second was made."""
    log = NotingLog()
    async with world(prefill=1, decode=1, log=log) as here:
        # To compute it on the one decode replica would stall more than its handoff takes.
        token_ids = list(range(3000))
        asking = asyncio.create_task(here.ask(request("r1", token_ids, 5)))
        while here.engine("prefill-0").load().pending_prefill_tokens == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        here.engine("prefill-0").crash()
        await asking
    (entry,) = log.entries()
    first, second = entry.plans
    assert (first.plan.prefill, second.plan.prefill) == ("prefill-0", None)
    assert second.after_s > first.after_s
    assert entry.error_ratio is None
    assert entry.outcome == "length"


def replayed(entries: Iterable[Entry]) -> list[tuple[str, list[int], int]]:
    """Requests of the same lengths that share what those of an audit shared: a block's tokens are
    made of its pseudonym, those behind the last one of the request's number."""
    made = []
    for number, entry in enumerate(entries):
        tokens: list[int] = []
        for name in entry.asked.names():
            block = random.Random(name)
            tokens += [block.randrange(32_000) for _ in range(entry.asked.block_tokens)]
        tail = random.Random(number)
        tokens += [tail.randrange(32_000) for _ in range(entry.asked.prompt_tokens - len(tokens))]
        made.append((entry.request_id, tokens, entry.answer_tokens))
    return made


async def test_an_audit_is_enough_to_run_its_requests_again() -> None:
    """Another cluster of the same shape, given prompts made of nothing but the audit, plans each
    request alike and finds as much of it cached."""
    first, again = NotingLog(), NotingLog()
    prompts = Prompts(random.Random(7))
    async with world(prefill=1, decode=1, log=first) as here:
        for number in range(40):
            await here.ask(prompts.next(f"r{number}"))
    async with world(prefill=1, decode=1, log=again) as here:
        for name, tokens, max_tokens in replayed(first.entries()):
            await here.ask(request(name, tokens, max_tokens))
    assert sum(entry.sources["decode"].get("device", 0) for entry in first.entries()) > 0
    for one, other in zip(first.entries(), again.entries(), strict=True):
        assert one.sources == other.sources
        assert one.plan.header() == other.plan.header()
