"""A split is carried out on both replicas at once, and only the decode replica is waited for."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from kv.catalogue import Tier
from kv.plan import Hints, Plan, Reason, Shape, Source, Span
from router.audit import Record
from router.run import Attempt, run
from tests.sim.world import World, answer, request, world
from workers.errors import ReplicaLostError
from workers.messages import Delta, Keep, Role, Submit
from workers.sim import SimEngine

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

P, D = "prefill-0", "decode-0"
PROMPT = range(2000)
HEAD, REACH = 960, 1984
HINTS = Hints(REACH, (Tier.VAULT,), 9.0, "tcp://p", HEAD, 5.0)
SPANS = (
    Span(Source.COMPUTE, 0, HEAD, P),
    Span(Source.FETCH, HEAD, REACH, D, Tier.VAULT),
    Span(Source.COMPUTE, REACH, 2000, D),
)
SPLIT = Plan(Shape.SPLIT, Reason.OVERLAP, P, D, SPANS, 0.5, 0.5, (), HINTS)


class Sent:
    """What an engine is sent."""

    def __init__(self, here: World, name: str) -> None:
        self.submits: list[Submit] = []
        member = here.fleet.member(name)
        assert member is not None
        send = member._link.send

        def noted(message: object) -> None:
            if isinstance(message, Submit):
                self.submits.append(message)
            send(message)  # type: ignore[arg-type]

        member._link.send = noted  # type: ignore[method-assign]


class Tried:
    """One attempt at a split of `PROMPT`."""

    def __init__(self, here: World, tokens: int = 4, **fields: object) -> None:
        self.asked = request("asked", PROMPT, tokens, **fields)
        keys = here.pipeline._planner.keys(self.asked)
        self.attempt = Attempt(self.asked, SPLIT, "asked.0", keys)
        self.record = Record("asked", "interactive", len(PROMPT), here.now())
        self.record.plans.append(SPLIT)
        self._here = here

    def deltas(self) -> AsyncGenerator[Delta, None]:
        return run(self._here.fleet, self.attempt, self.record)

    async def answered(self) -> None:
        """It is what the prompt must be answered."""
        async with aclosing(self.deltas()) as deltas:
            tokens = [token async for delta in deltas for token in delta.token_ids]
        assert tokens == answer(self.asked)


def busy(engine: SimEngine) -> bool:
    load = engine.load()
    return bool(load.waiting or load.running)


async def test_both_are_asked_at_once_and_nothing_is_handed_off() -> None:
    """P for the head, to be lent, under the id of D's request; D for all, with its hints. What each
    computed is known at the end, and P keeps nothing."""
    async with world(prefill=1, decode=1) as here:
        p, d = Sent(here, P), Sent(here, D)
        tried = Tried(here)
        await tried.answered()
        [head], [whole] = p.submits, d.submits
        assert (head.role, head.lends, head.request_id) == (Role.PREFILL, True, whole.request_id)
        assert head.tokens == tried.asked.tokens[: 4 * HEAD]
        assert head.hints == Hints()
        assert (whole.tokens, whole.hints, whole.lends) == (tried.asked.tokens, HINTS, False)
        assert whole.handoff is None
        sources = tried.record.prefill_sources
        assert sources is not None
        assert sources.computed_tokens == HEAD
        assert here.engine(P).load().leased == 0
        await here.quiet()
        here.check()


async def test_both_count_as_busy_with_their_own_parts() -> None:
    """P with the head and its blocks, D with the rest, until the answer begins."""
    async with world(prefill=1, decode=1) as here:
        tried = Tried(here)
        async with aclosing(tried.deltas()) as deltas:
            first = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0.01)
            snapshot = here.fleet.snapshot(tried.attempt.keys, None)
            queued = [view.queued_tokens for view in (*snapshot.prefill, *snapshot.decode)]
            assert queued[0] == HEAD
            assert queued[1] >= 2000 - REACH
            assert here.fleet.expected == 2
            await first
            assert here.fleet.expected == 0
        await here.quiet()
        here.check()


async def test_a_head_gives_way_as_its_request_does() -> None:
    """For as long, with blocks that are the first to go; and nobody plans around it."""
    async with world(prefill=1, decode=1) as here:
        p, d = Sent(here, P), Sent(here, D)
        keep = Keep(yields=True)
        tried = Tried(here, keep=keep, patient_until_s=here.now() + 60.0)
        answered = asyncio.ensure_future(tried.answered())
        await asyncio.sleep(0.01)
        assert here.fleet.expected == 0
        await answered
        for sent in (*p.submits, *d.submits):
            assert sent.patience_s == pytest.approx(60.0, abs=0.1)
            assert sent.keep == keep
        assert p.submits[0].lends
        await here.quiet()
        here.check()


async def test_a_lost_prefill_replica_ends_nothing() -> None:
    """D knows by itself that the head does not come."""
    async with world(prefill=1, decode=1) as here:
        tried = Tried(here)
        answered = asyncio.ensure_future(tried.answered())
        await asyncio.sleep(0.05)
        here.engine(P).crash()
        await answered
        assert tried.record.prefill_sources is None
        assert not tried.attempt.in_prefill


async def test_a_prefill_replica_that_is_gone_is_not_asked() -> None:
    """Nor missed."""
    async with world(prefill=1, decode=1) as here:
        member = here.fleet.member(P)
        assert member is not None
        member.lose("gone")
        await Tried(here).answered()


async def test_a_lost_decode_replica_ends_the_attempt_and_its_head() -> None:
    """The pipeline plans again; P does not go on for nobody."""
    async with world(prefill=1, decode=2) as here:
        tried = Tried(here)
        answered = asyncio.ensure_future(tried.answered())
        await asyncio.sleep(0.05)
        assert busy(here.engine(P))
        here.engine(D).crash()
        with pytest.raises(ReplicaLostError) as lost:
            await answered
        assert lost.value.replica == D == tried.attempt.replica
        await here.quiet()
        assert not busy(here.engine(P))


async def test_who_leaves_is_served_no_further() -> None:
    """Both replicas stop."""
    async with world(prefill=1, decode=1) as here:
        tried = Tried(here)
        answered = asyncio.ensure_future(tried.answered())
        await asyncio.sleep(0.05)
        answered.cancel()
        await asyncio.gather(answered, return_exceptions=True)
        await here.quiet()
        here.check()


async def test_a_head_that_is_not_needed_any_more_is_stopped() -> None:
    """D has begun to answer without it."""
    async with world(prefill=1, decode=1) as here:
        here.engine(P).hang()
        member = here.fleet.member(P)
        assert member is not None
        async with aclosing(Tried(here, tokens=40).deltas()) as deltas:
            await anext(deltas)
            await asyncio.sleep(0.1)
            assert member.requests == 0
        here.engine(P).resume()
        await here.quiet()
        assert not busy(here.engine(P))
