"""Splits that the planner chose, over simulated replicas that lend: in time, and through faults."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES
from kv.plan import Reason, Shape
from router.audit import Record
from router.request import Request
from tests.sim.test_sim_world import ask_all, fault_often
from tests.sim.world import COSTS, Prompts, World, answer, idle, request, world
from workers.messages import Role
from workers.sim import SimCosts

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

# A token takes as long to fetch as to compute.
EVEN = LinkCurve(0.02, COSTS.prefill.per_token_s / 46_080)
LENDING = replace(COSTS, host_blocks=2048, lends=True, peer=GUESSES[Tier.PEER], answer_s=0.5)
SPLITTING = replace(LENDING, vault=EVEN)
P, D = "prefill-0", "decode-0"
PROMPT = range(2000)
HELD = 1984  # of its full blocks


async def emptied(here: World) -> None:
    """Nobody but the vault has anything."""
    for member in here.fleet.members():
        member.reset()
    await here.quiet()
    assert not any(engine.cached() for engine in here.cluster.engines.values())


@asynccontextmanager
async def stored(decode: int = 2, costs: SimCosts = SPLITTING) -> AsyncIterator[World]:
    """A world in which the vault alone has the prompt."""
    async with world(prefill=1, decode=decode, costs=costs) as here:
        await here.ask(request("stored", PROMPT, 2))
        await emptied(here)
        yield here


def asked() -> Request:
    return request("asked", PROMPT, 4)


def split_at(record: Record) -> int:
    """How many tokens its first plan had P compute."""
    first = record.plans[0]
    assert (first.shape, first.reason) == (Shape.SPLIT, Reason.OVERLAP)
    return first.hints.head_tokens


def by_source(record: Record) -> dict[str, int]:
    return record.sources()["decode"]


async def test_a_prompt_that_takes_as_long_to_fetch_as_to_compute_is_split() -> None:
    """In little more than half of the time of either, as was predicted; P's head and the vault's
    tail are all of the prompt but its last tokens, and nothing is held afterwards."""
    async with stored() as here:
        assert await here.ask(asked()) == answer(asked())
        record = here.audit.records[-1]
        head = split_at(record)
        assert by_source(record) == {"peer": head, "vault": HELD - head, "computed": 16}
        assert record.sources()["prefill"] == {"computed": head}
        assert record.cached_tokens() == HELD - head
        assert record.ttft_s == pytest.approx(record.plan.predicted_ttft_s, abs=0.06)
        assert record.ttft_s < 0.65 * COSTS.prefill.seconds(2000, 0)
        assert len(record.plans) == 1
        await here.quiet()
        here.check()


@pytest.mark.parametrize("ratio", [0.1, 10.0])
async def test_a_much_faster_or_slower_vault_is_not_split_with(ratio: float) -> None:
    """Its own curve says so."""
    curve = LinkCurve(EVEN.latency_s, ratio * EVEN.per_byte_s)
    async with stored(costs=replace(SPLITTING, vault=curve)) as here:
        await here.ask(asked())
        shape = here.audit.records[-1].plan.shape
        assert shape in ({Shape.FETCH} if ratio < 1.0 else {Shape.LOCAL, Shape.REMOTE})


async def faulted(here: World, fault: Callable[[], object], after_s: float = 0.2) -> Record:
    """The answer is right, whatever happens so long after it was asked for."""
    asyncio.get_running_loop().call_later(after_s, fault)
    assert await here.ask(asked()) == answer(asked())
    record = here.audit.records[-1]
    assert record.ttft_s is not None
    return record


@pytest.mark.parametrize("fault", ["crash", "hang"])
async def test_a_prefill_replica_lost_midway_costs_nothing_that_came(fault: str) -> None:
    """D goes on by itself, once P has said nothing for as long as it may: the vault brings the
    rest of the head, and no block that P had computed by then is fetched twice."""
    async with stored() as here:
        engine = here.engine(P)
        record = await faulted(here, getattr(engine, fault))
        head, sources = split_at(record), by_source(record)
        assert 0 < sources["peer"] < head
        assert sources == {"peer": sources["peer"], "vault": HELD - sources["peer"], "computed": 16}
        assert len(record.plans) == 1
        lacked_s = EVEN.seconds((head - sources["peer"]) * 46_080)
        assert record.ttft_s == pytest.approx(0.2 + SPLITTING.answer_s + lacked_s, abs=0.06)
        if fault == "crash":
            here.start(P, Role.PREFILL, epoch="2")
        engine.resume()
        await here.warmed()
        here.check()


async def test_a_prefill_replica_that_only_stood_still_for_a_moment_is_not_lost() -> None:
    """All of its head comes from it."""
    async with stored() as here:
        engine = here.engine(P)
        asyncio.get_running_loop().call_later(0.2 + 0.4, engine.resume)
        record = await faulted(here, engine.hang)
        assert by_source(record)["peer"] == split_at(record)
        await here.quiet()
        here.check()


async def test_a_prefill_replica_that_refuses_its_head_ends_nothing() -> None:
    """D waits for it until the head's deadline at most; then the vault brings all."""
    async with stored() as here:
        here.engine(P).refuse_next(1)
        assert await here.ask(asked()) == answer(asked())
        record = here.audit.records[-1]
        assert by_source(record) == {"vault": HELD, "computed": 16}
        assert record.ttft_s is not None
        assert record.ttft_s < record.plan.hints.head_deadline_s + EVEN.seconds(HELD * 46_080) + 0.1
        await here.quiet()
        here.check()


@pytest.mark.parametrize("fault", ["crash", "hang"])
async def test_a_decode_replica_lost_midway_is_replaced(fault: str) -> None:
    """The other one answers, P's first head is stopped, and nothing stays held on any."""
    async with stored() as here:
        chosen = []

        def strike() -> None:
            chosen.append(here.audit.records[-1].plan.decode)
            getattr(here.engine(chosen[0]), fault)()

        record = await faulted(here, strike)
        assert record.plans[0].shape is Shape.SPLIT
        assert record.plan.reason is Reason.DECODE_LOST
        assert record.plan.decode != chosen[0]
        if fault == "crash":
            here.start(chosen[0], Role.DECODE, epoch="2")
        here.engine(chosen[0]).resume()
        await here.warmed()
        here.check()


@pytest.mark.parametrize("after_s", [0.01, 0.1, 0.4, 0.55, 0.6])
async def test_a_client_that_leaves_a_split_leaves_nothing(after_s: float) -> None:
    """Whether both sides were under way, one, or none; P's step ends what it began."""
    async with stored() as here:
        call = asyncio.create_task(here.ask(asked()))
        await asyncio.sleep(after_s)
        assert here.audit.records[-1].plan.shape is Shape.SPLIT
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(COSTS.prefill.seconds(HELD // 2, 0))
        assert all(idle(engine) for engine in here.cluster.engines.values())
        await here.quiet()
        here.check()


async def test_a_forgotten_prompt_is_in_no_split() -> None:
    """The vault has lost it on every replica's order, and so has the catalogue."""
    async with stored() as here:
        for member in here.fleet.members():
            await member.forget(("",))
        await asyncio.sleep(1.0)
        assert await here.ask(asked()) == answer(asked())
        assert here.audit.records[-1].cached_tokens() == 0


@pytest.mark.parametrize("seed", range(3))
async def test_splits_through_all_faults_leave_nothing_behind(seed: int) -> None:
    """300 requests while replicas crash, hang and refuse, and caches are emptied all the time:
    what is answered is right, many are split, and the books balance."""
    rng = random.Random(seed)
    prompts = Prompts(rng, families=4)
    async with world(costs=SPLITTING) as here:
        tasks = [
            asyncio.create_task(fault_often(here, rng)),
            asyncio.create_task(empty_often(here)),
        ]
        given = [prompts.next(f"r{i}") for i in range(300)]
        outcomes = await ask_all(here, rng, given, 60.0)
        await asyncio.gather(*tasks)
        right = [got == answer(one) for got, one in zip(outcomes, given, strict=True)]
        failed = [isinstance(got, BaseException) for got in outcomes]
        assert all(a or b for a, b in zip(right, failed, strict=True))
        assert sum(right) > 250
        shapes = [record.plan.shape for record in here.audit.records]
        assert shapes.count(Shape.SPLIT) >= 10
        await asyncio.sleep(45.0)  # leases of handoffs that crossed a crash
        await here.warmed()
        here.check()


async def empty_often(here: World) -> None:
    for _ in range(60):
        await asyncio.sleep(1.0)
        for member in here.fleet.members():
            member.reset()
