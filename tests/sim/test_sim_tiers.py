"""Replicas with a host tier: what left the device is fetched where that is planned."""

import asyncio
import random
from dataclasses import replace

import pytest

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.parts import Action, in_turn
from kv.plan import Reason, Shape, Source, Span
from router.audit import Record
from router.run import Attempt
from tests.sim.world import COSTS, Prompts, World, answer, request, world
from workers.messages import Role

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

TIERED = replace(COSTS, host_blocks=4096)
PROMPT = range(1000)
HELD = 992  # of its full blocks


async def displaced(here: World) -> None:
    """The prompt was computed, and others took its pages."""
    await here.ask(request("first", PROMPT, 2))
    for number in range(1, 4):
        await here.ask(
            request(f"other-{number}", range(10_000 * number, 10_000 * number + 1500), 2)
        )
    await here.quiet()


async def again(here: World) -> Record:
    asked = request("again", PROMPT, 2)
    assert await here.ask(asked) == answer(asked)
    return here.audit.records[-1]


def fetched(record: Record) -> int:
    spans = (span for span in record.plan.spans if span.source is Source.FETCH)
    return sum(span.end_token - span.start_token for span in spans)


async def test_what_left_the_device_is_fetched_from_host_memory() -> None:
    """As planned, in the time that was predicted, and counted as what it is."""
    async with world(prefill=0, decode=1, costs=TIERED, kv_blocks=128) as here:
        await displaced(here)
        record = await again(here)
        assert (record.plan.shape, record.plan.reason) == (Shape.FETCH, Reason.CHEAPER_FETCH)
        assert [span.tier for span in record.plan.spans] == [Tier.HOST, None]
        assert fetched(record) == HELD
        assert record.sources() == {"decode": {"host": HELD, "computed": 8}}
        assert record.cached_tokens() == HELD
        assert record.ttft_s == pytest.approx(record.plan.predicted_ttft_s, abs=0.05)


async def test_a_prefill_replica_fetches_and_hands_off() -> None:
    """P's host tier serves a D that would have to compute all of it beside its streams."""
    async with world(prefill=1, decode=1, costs=TIERED, kv_blocks=128) as here:
        await displaced(here)
        record = await again(here)
        assert record.plan.shape in (Shape.FETCH, Shape.FETCH_REMOTE)
        by = record.prefill_sources or record.decode_sources
        assert by is not None
        assert by.host_tokens == fetched(record) == HELD


async def test_a_tier_that_is_slower_than_computing_is_left_alone() -> None:
    """Though it holds the prompt, which the engine would take if it were not told."""
    slow = replace(TIERED, host=LinkCurve(10.0, 0.0))
    async with world(prefill=0, decode=1, costs=slow, kv_blocks=128) as here:
        await displaced(here)
        record = await again(here)
        assert record.plan.shape is Shape.LOCAL
        assert record.sources() == {"decode": {"computed": 1000}}


async def test_a_holder_is_preferred_to_an_idle_replica() -> None:
    """What one D has in host memory is fetched there, not computed on another."""
    async with world(prefill=0, decode=3, costs=TIERED, kv_blocks=128) as here:
        await here.ask(request("first", PROMPT, 2))
        holder = here.audit.records[-1].plan.decode
        for number in range(1, 10):
            start = 10_000 * number
            await here.ask(request(f"other-{number}", range(start, start + 1500), 2))
        await here.quiet()
        record = await again(here)
        assert record.plan.decode == holder
        assert fetched(record) == HELD


async def test_an_engine_that_restarts_has_an_empty_host_tier() -> None:
    """Nothing of its predecessor is planned with."""
    async with world(prefill=0, decode=1, costs=TIERED, kv_blocks=128) as here:
        await displaced(here)
        here.engine("decode-0").crash()
        here.start("decode-0", Role.DECODE, epoch="2", kv_blocks=128)
        await here.warmed()
        record = await again(here)
        assert record.plan.shape is Shape.LOCAL
        assert record.sources() == {"decode": {"computed": 1000}}


async def test_plans_over_small_tiers_are_kept_and_tokens_are_right() -> None:
    """Caches that evict all the time, and a host tier that does too: no request takes more from it
    than its plan says, most plans get what they counted on, and the catalogue follows."""
    tight = replace(TIERED, host_blocks=600)
    async with world(costs=tight, kv_blocks=160) as here:
        prompts = Prompts(random.Random(5))
        planned = given = 0
        for number in range(150):
            asked = prompts.next(f"r{number}")
            assert await here.ask(asked) == answer(asked)
            record = here.audit.records[-1]
            by = record.prefill_sources or record.decode_sources
            assert by is not None
            reach = record.plan.spans[-1].start_token
            assert by.host_tokens <= max(0, reach - by.device_tokens)
            planned, given = planned + fetched(record), given + by.host_tokens
        assert 0.9 * planned <= given
        assert planned > 1000
        await here.quiet()
        here.check()
        for member in here.fleet.members():
            held = here.node.holdings.blocks(member.replica.epoch, Tier.HOST)
            assert held == member.load.tiers[Tier.HOST].blocks <= 600


async def test_what_is_fetched_next_comes_behind_what_is_under_way() -> None:
    """A plan's bytes count from when it is sent for as long as they are predicted to take, and
    until its first token at most: not while it computes behind them. What a batch request fetches
    whenever others let it keeps nobody."""
    async with world(prefill=0, decode=1, costs=TIERED, kv_blocks=128) as here:
        member = here.fleet.members()[0]

        def cost() -> LinkCurve:
            [row] = here.fleet.snapshot((), None).decode
            return row.tiers[0].curve

        idle = cost()
        asked = request("asked", range(700), 1)
        await here.ask(asked)
        fetched = Span(Source.FETCH, 0, 640, "decode-0", Tier.HOST)
        plan = replace(
            here.audit.records[-1].plan,
            spans=(fetched, Span(Source.COMPUTE, 640, 700, "decode-0")),
            parts=in_turn([(Action.FETCH, "decode-0", 0.5), (Action.COMPUTE, "decode-0", 9.0)]),
        )
        with here.fleet.fetching("decode-0", plan), here.fleet.fetching("decode-0", plan):
            n_bytes = 2 * 640 * member.replica.kv_bytes_per_token
            assert cost().seconds(0) == pytest.approx(idle.seconds(n_bytes))
            assert cost().per_byte_s == idle.per_byte_s
            await asyncio.sleep(0.4)
            assert cost() != idle
            await asyncio.sleep(0.2)
            assert cost() == idle
        with here.fleet.fetching("decode-0", plan):
            assert cost() != idle
        assert cost() == idle
        attempt = Attempt(replace(asked, patient_until_s=9.0), plan, "batch", ())
        with attempt.fetching(here.fleet, "decode-0"):
            assert cost() == idle
        await displaced(here)
        await again(here)
        assert not member.fetching
