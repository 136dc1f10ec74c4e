"""The real pipeline, fleet, catalogue and policy over simulated replicas, on virtual time."""

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import looptime
import pytest

from kv.plan import Reason, Shape
from router.audit import Record
from router.context import RequestContext
from router.errors import (
    DeadlineError,
    NoReplicaError,
    OverloadedError,
    RequestLostError,
)
from router.request import Request
from tests.sim.world import Prompts, World, answer, idle, request, world
from workers.messages import Blocks, Role
from workers.sim import SimEngine
from workers.sim_link import WIRE_S

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

Result = TypeVar("Result")
Outcome = list[int] | BaseException


async def after(delay_s: float, here: World, asked: Request) -> list[int]:
    await asyncio.sleep(delay_s)
    return await here.ask(asked)


async def ask_all(
    here: World, rng: random.Random, asked: Sequence[Request], within_s: float
) -> list[Outcome]:
    """What came of each request, all started at random moments of `within_s`."""
    calls = (after(rng.uniform(0, within_s), here, one) for one in asked)
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_thousands_of_requests_get_exactly_their_tokens() -> None:
    """2,000 requests with shared prefixes are all answered right, and leave nothing behind."""
    rng = random.Random(1)
    prompts = Prompts(rng)
    async with world() as here:
        asked = [prompts.next(f"r{i}") for i in range(2000)]
        assert await ask_all(here, rng, asked, 60.0) == [answer(one) for one in asked]
        shapes = {record.plan.shape for record in here.audit.records}
        assert shapes == {Shape.LOCAL, Shape.REMOTE}
        assert sum(record.cached_tokens() for record in here.audit.records) > 50_000
        await here.quiet()
        here.check()


async def test_small_caches_evict_and_the_catalogue_follows() -> None:
    """With room for a few prompts only, answers stay right and the catalogue stays true."""
    rng = random.Random(2)
    prompts = Prompts(rng)
    async with world(kv_blocks=200) as here:
        asked = [prompts.next(f"r{i}") for i in range(300)]
        assert await ask_all(here, rng, asked, 60.0) == [answer(one) for one in asked]
        await here.quiet()
        here.check()
        assert max(here.fleet.cached_blocks(m) for m in here.fleet.members()) <= 200


@pytest.mark.parametrize("seed", range(4))
async def test_lost_prefill_replicas_cost_no_answer(seed: int) -> None:
    """Prefill replicas that crash at random moments, and come back, never cost a request."""
    rng = random.Random(seed)
    prompts = Prompts(rng)
    async with world() as here:
        crashing = asyncio.create_task(crash_often(here, rng, Role.PREFILL, 2))
        asked = [prompts.next(f"r{i}") for i in range(300)]
        assert await ask_all(here, rng, asked, 40.0) == [answer(one) for one in asked]
        await crashing
        reasons = {plan.reason for record in here.audit.records for plan in record.plans}
        assert Reason.PREFILL_LOST in reasons
        await here.warmed()
        here.check()


@pytest.mark.parametrize("seed", range(4))
async def test_lost_decode_replicas_cost_no_answer(seed: int) -> None:
    """Decode replicas that crash in mid-stream cost nothing: each stream goes on on another,
    no token is lost or doubled, and nothing stays held."""
    rng = random.Random(seed)
    prompts = Prompts(rng)
    async with world() as here:
        crashing = asyncio.create_task(crash_often(here, rng, Role.DECODE, 3))
        asked = [prompts.next(f"r{i}") for i in range(300)]
        assert await ask_all(here, rng, asked, 40.0) == [answer(one) for one in asked]
        await crashing
        reasons = [plan.reason for record in here.audit.records for plan in record.plans]
        assert reasons.count(Reason.DECODE_LOST) > 3
        await here.warmed()
        here.check()


async def test_what_cannot_be_carried_ends_with_an_error_that_says_so() -> None:
    """A stream whose state cannot go on elsewhere is ended, with the reason, and not wrongly
    continued; before its first token it is planned again like any other."""
    async with world(prefill=0, decode=2) as here:
        asked = request("r", range(40), 100, uncarried="bad_words")
        asyncio.get_running_loop().call_later(0.6, _crash_busiest, here)
        with pytest.raises(RequestLostError, match="bad_words cannot be carried on"):
            await here.ask(asked)


def _crash_busiest(here: World) -> None:
    max(here.cluster.engines.values(), key=lambda engine: engine.load().running).crash()


async def crash_often(here: World, rng: random.Random, role: Role, count: int) -> None:
    """One replica of a pool after the other dies, and is back under its name 10 s later."""
    for number in range(4):
        await asyncio.sleep(rng.uniform(2, 10))
        name = f"{role}-{rng.randrange(count)}"
        here.engine(name).crash()
        del here.directory.announced[name]
        await asyncio.sleep(rng.uniform(0.1, 10))
        here.start(name, role, epoch=f"after-{number}")


def ordered(here: World, asked: Sequence[Request]) -> list[Record]:
    by_name = {record.request_id: record for record in here.audit.records}
    return [by_name[one.request_id] for one in asked]


def used(asked: Request) -> int:
    """What a request that was answered is counted as: its prompt, once, and its answer."""
    return asked.prompt_tokens + len(answer(asked))


async def test_tokens_are_counted_once_however_many_replicas_died() -> None:
    """What a tenant is debited is the prompt and the answer of each request, over all choices of
    one call; what a second plan computes again is the cluster's own loss."""
    rng = random.Random(7)
    prompts = Prompts(rng)
    async with world() as here:
        crashing = asyncio.create_task(crash_often(here, rng, Role.DECODE, 3))
        asked = [prompts.next(f"r{i}") for i in range(300)]
        call = asked[0].notes
        asked[1:3] = [replace(one, notes=call) for one in asked[1:3]]
        await ask_all(here, rng, asked, 40.0)
        await crashing
        assert max(len(record.plans) for record in here.audit.records) > 1
        assert call.used_tokens == sum(map(used, asked[:3]))
        assert [one.notes.used_tokens for one in asked[3:]] == list(map(used, asked[3:]))


async def test_a_stream_is_right_up_to_the_loss_of_its_replica() -> None:
    """What a client saw before RequestLostError is the beginning of the right answer."""
    async with world(prefill=0, decode=1) as here:
        asked, seen = request("r", range(40), 100), list[int]()

        async def watch() -> None:
            async for delta in here.pipeline.serve(asked):
                seen.extend(delta.token_ids)

        asyncio.get_running_loop().call_later(0.6, here.engine("decode-0").crash)
        with pytest.raises(RequestLostError, match="silent"):
            await watch()
        assert 5 < len(seen) < 100
        assert seen == answer(asked)[: len(seen)]
        assert here.audit.records[-1].outcome == "failed"


async def test_requests_of_a_hung_replica_fail_over() -> None:
    """A replica that hangs before the first token is given up after 3 s for another one."""
    async with world(prefill=0, decode=2) as here:
        here.engine("decode-0").hang()
        asked = request("r", range(40), 5)
        began = asyncio.get_running_loop().time()
        assert await here.ask(asked) == answer(asked)
        took_s = asyncio.get_running_loop().time() - began
        assert 2.0 < took_s < 4.0
        plans = here.audit.records[-1].plans
        assert [plan.decode for plan in plans] == ["decode-0", "decode-1"]
        assert plans[-1].reason is Reason.DECODE_LOST


@pytest.mark.parametrize("hung_s", [1.0, 5.0, 20.0])
async def test_a_replica_that_hung_is_used_again(hung_s: float) -> None:
    """However long it hung, a replica that answers again gets work again and holds nothing old."""
    async with world(prefill=1, decode=1) as here:
        asked = [request(f"r{i}", range(i, 300 + i), 50) for i in range(2)]
        calls = [asyncio.create_task(here.ask(one)) for one in asked]
        await asyncio.sleep(0.4)
        for engine in here.cluster.engines.values():
            engine.hang()
        await asyncio.sleep(hung_s)
        for engine in here.cluster.engines.values():
            engine.resume()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(15.0)
        await here.warmed()
        assert await here.ask(asked[0]) == answer(asked[0])
        await here.quiet()
        here.check()


async def test_a_replica_that_refuses_does_not_fail_a_request() -> None:
    """While another replica can serve, one that refuses everything costs only time."""
    async with world() as here:
        for refusing in ("prefill-0", "decode-0"):
            here.engine(refusing).refuse_next(10_000)
        prompts = Prompts(random.Random(3))
        asked = [prompts.next(f"r{i}") for i in range(100)]
        assert await ask_all(here, random.Random(3), asked, 10.0) == [answer(one) for one in asked]


async def test_one_refusal_of_the_only_replica_is_tried_again() -> None:
    """A replica that refused is still asked when there is no other."""
    async with world(prefill=1, decode=1) as here:
        here.engine("decode-0").refuse_next(1)
        asked = request("r", range(40), 5)
        assert await here.ask(asked) == answer(asked)


async def test_a_request_that_everybody_refuses_ends() -> None:
    """After four plans it is the request that is at fault; no plan is recorded in vain."""
    async with world(prefill=1, decode=1) as here:
        here.engine("prefill-0").refuse_next(1000)
        here.engine("decode-0").refuse_next(1000)
        with pytest.raises(RequestLostError, match="4 plans failed"):
            await here.ask(request("r", range(2000), 5))
        assert len(here.audit.records[-1].plans) == 4
        await here.quiet()
        here.check()


@pytest.mark.parametrize("seed", range(6))
async def test_clients_that_leave_free_everything(seed: int) -> None:
    """Whenever a client leaves, pages, leases and places are free and nothing runs on."""
    rng = random.Random(seed)
    prompts = Prompts(rng)
    async with world() as here:
        calls = []
        for number in range(300):
            calls.append(asyncio.create_task(here.ask(prompts.next(f"r{number}"))))
            asyncio.get_running_loop().call_later(rng.uniform(0, 0.5), calls[-1].cancel)
            await asyncio.sleep(rng.expovariate(20))
        ended = await asyncio.gather(*calls, return_exceptions=True)
        left = sum(isinstance(end, asyncio.CancelledError) for end in ended)
        assert 50 < left < 250
        # Far less than a lease lasts: nothing waits for one to end.
        await asyncio.sleep(12.0)
        assert all(idle(engine) for engine in here.cluster.engines.values())
        expired = [engine.load().totals.expired_leases for engine in here.cluster.engines.values()]
        assert expired == [0] * 5
        here.check()


async def test_a_client_that_leaves_ends_its_stream_at_once() -> None:
    """The replica does not go on for somebody who is gone."""
    async with world() as here:
        call = asyncio.create_task(here.ask(request("r", range(40), 10_000)))
        await asyncio.sleep(1.0)
        call.cancel()
        await asyncio.sleep(0.1)
        assert all(idle(engine) for engine in here.cluster.engines.values())


async def test_a_client_that_leaves_as_its_prefill_ends_leaves_no_lease() -> None:
    """Wherever the abort crosses the handoff, on P's way, ours or D's, P's pages come back."""
    async with world(prefill=1, decode=1) as here:
        ends_s = here.costs.prefill.seconds(1000, 0)
        for number in range(40):
            prompt = range(1000 * number, 1000 * number + 1000)
            call = asyncio.create_task(here.ask(request(f"r{number}", prompt, 3)))
            await asyncio.sleep(ends_s + (number - 10) * WIRE_S / 4)
            call.cancel()
            await asyncio.sleep(1.0)
            assert all(idle(engine) for engine in here.cluster.engines.values())
        assert {record.outcome for record in here.audit.records} == {"aborted"}
        here.check()


async def test_a_handoff_that_the_decode_replica_refuses_is_given_back() -> None:
    """The next plan prefills anew; the first handoff's lease does not wait for its end."""
    async with world() as here:
        for name in ("decode-0", "decode-1", "decode-2"):
            here.engine(name).refuse_next(1)
        asked = request("r", range(1000), 3)
        assert await here.ask(asked) == answer(asked)
        assert [plan.shape for plan in here.audit.records[-1].plans] == [Shape.REMOTE] * 4
        await asyncio.sleep(1.0)
        assert all(idle(engine) for engine in here.cluster.engines.values())


async def test_a_read_from_a_prefill_replica_that_hangs_is_given_up() -> None:
    """Slow loads have an escape: where a read needs its source to send, one that hangs after its
    handoff costs the request the 3 s of silence, and nothing stays held once it goes on."""
    async with world(prefill=2, decode=2) as here:
        asked = request("r", range(4000), 5)
        call = asyncio.create_task(here.ask(asked))
        source = await _leasing(here)
        source.hang(readable=False)
        began = here.now()
        assert await call == answer(asked)
        plans = here.audit.records[-1].plans
        assert plans[-1].reason is Reason.PREFILL_LOST
        assert plans[-1].prefill != plans[0].prefill
        assert here.now() - began < 3.5 + plans[-1].predicted_ttft_s + 1.0
        source.resume()
        await here.warmed()
        here.check()


async def test_blocks_are_kept_for_a_reader_that_may_only_hang() -> None:
    """A decode replica that is lost before it has read a handoff may wake and read it: were the
    pages given to another prompt by then, it would take that one's KV for its own and cache it.
    So they stay until it has read them, or until their lease of 30 s ends."""
    async with world(prefill=1, decode=2) as here:
        for number, wakes in enumerate((True, False)):
            asked = request(f"r{number}", range(number * 5000, number * 5000 + 4000), 5)
            call = asyncio.create_task(here.ask(asked))
            source = await _leasing(here)
            leased_at = here.now()
            reader = here.engine(here.audit.records[-1].plan.decode)
            reader.hang()
            assert await call == answer(asked)
            await asyncio.sleep(1.0)
            assert source.load().leased == 1
            if wakes:
                reader.resume()
                await asyncio.sleep(1.0)
                assert source.load().leased == 0
                await here.warmed()
            else:
                await asyncio.sleep(leased_at + 31.0 - here.now())
                assert source.load().leased == 0


async def _leasing(here: World) -> SimEngine:
    """The prefill replica that has just made a handoff."""
    sources = [here.engine(f"prefill-{i}") for i in range(len(here.fleet.up(Role.PREFILL)))]
    while not any(source.load().leased for source in sources):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return next(source for source in sources if source.load().leased)


@pytest.mark.parametrize("seed", range(3))
async def test_all_faults_at_once_leave_nothing_behind(seed: int) -> None:
    """Crashes, hangs, refusals and leaving clients together: every answer right, books balanced."""
    rng = random.Random(100 + seed)
    prompts = Prompts(rng)
    async with world() as here:
        faults = asyncio.create_task(fault_often(here, rng))
        calls = []
        for number in range(400):
            asked = prompts.next(f"r{number}")
            call = asyncio.create_task(here.ask(asked))
            calls.append((asked, call))
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.5), call.cancel)
            await asyncio.sleep(rng.expovariate(8))
        await asyncio.gather(*(call for _, call in calls), return_exceptions=True)
        await faults
        for asked, call in calls:
            if not call.cancelled() and call.exception() is None:
                assert call.result() == answer(asked)
            elif not call.cancelled():
                assert isinstance(call.exception(), RequestLostError | NoReplicaError)
        await asyncio.sleep(45.0)  # leases of handoffs that crossed a crash
        await here.warmed()
        here.check()


async def fault_often(here: World, rng: random.Random) -> None:
    for number in range(8):
        await asyncio.sleep(rng.uniform(1, 6))
        name = rng.choice(sorted(here.cluster.engines))
        match rng.randrange(3):
            case 0:
                here.engine(name).refuse_next(20)
            case 1:
                here.engine(name).hang()
                await asyncio.sleep(rng.choice([0.5, 5.0, 15.0]))
                here.engine(name).resume()
            case 2:
                role = here.engine(name).replica.role
                here.engine(name).crash()
                await asyncio.sleep(rng.uniform(0.1, 6))
                here.start(name, role, epoch=f"after-{number}")


def test_the_same_seed_gives_the_same_decisions() -> None:
    """Nothing in a decision depends on real time or unseeded chance."""
    first, second = (on_a_new_loop(decisions()) for _ in range(2))
    assert first == second


async def decisions() -> list[tuple[str, float, str, float | None]]:
    rng = random.Random(7)
    prompts = Prompts(rng)
    async with world() as here:
        asked = [prompts.next(f"r{i}") for i in range(200)]
        await ask_all(here, rng, asked, 20.0)
        records = here.audit.records
        return [(r.request_id, r.started_at, r.plan.header(), r.ttft_s) for r in records]


def on_a_new_loop(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=lambda: looptime.new_event_loop(start=0)) as runner:
        return runner.run(work)


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 17, 40, 300, 1000, 3000])
@pytest.mark.parametrize("prefill", [0, 2])
async def test_predicted_ttft_is_the_actual_one_on_an_idle_cluster(
    prompt_tokens: int, prefill: int
) -> None:
    """With exact curves and no queue the prediction is within 5 %, cached or not."""
    async with world(prefill=prefill, decode=2) as here:
        for number, prompt in enumerate([range(prompt_tokens)] * 3):
            await here.ask(request(f"r{number}", prompt, 3))
            await asyncio.sleep(3.0)
        for record in here.audit.records:
            assert record.ttft_s == pytest.approx(record.plan.predicted_ttft_s, rel=0.05)


async def test_a_repeated_prompt_is_a_hit_the_second_time() -> None:
    """The second request finds the first one's blocks, and says how much was cached."""
    async with world() as here:
        for number in range(2):
            await here.ask(request(f"r{number}", range(1000), 3))
            await asyncio.sleep(1.0)
        first, second = here.audit.records
        assert first.cached_tokens() == 0
        assert second.cached_tokens() == 992
        assert second.plan.spans[0].end_token == 992


async def test_a_snapshot_replaces_what_was_known() -> None:
    """Blocks that a snapshot lacks are gone from the catalogue."""
    async with world() as here:
        await here.ask(request("r", range(1000), 3))
        await here.quiet()
        member = here.node.roster.members()[-1]
        member.receive(Blocks(1000, stored=b"k" * 16, snapshot=True))
        assert here.fleet.cached_blocks(member) == 1


async def test_without_decode_replicas_a_request_is_refused() -> None:
    """No replica is an error that says how many there are, and holds no place."""
    async with world(prefill=0, decode=1) as here:
        here.directory.announced.clear()
        here.engine("decode-0").crash()
        await asyncio.sleep(6.0)
        with pytest.raises(NoReplicaError, match="0 decode and 0 prefill"):
            await here.ask(request("r", range(40), 5))
        assert here.admission.held == 0


async def test_a_directory_that_is_down_stops_nothing() -> None:
    """Links go on by themselves."""
    async with world() as here:
        here.directory.down = True
        await asyncio.sleep(10.0)
        asked = request("r", range(400), 5)
        assert await here.ask(asked) == answer(asked)


async def test_more_requests_than_the_limit_are_refused_at_once() -> None:
    """The request past the limit fails with the numbers; the others are served."""
    async with world(limit=3) as here:
        asked = [request(f"r{i}", range(i, i + 40), 5) for i in range(5)]
        outcomes = await ask_all(here, random.Random(0), asked, 0.0)
        refused = [got for got in outcomes if isinstance(got, OverloadedError)]
        assert [str(error)[:31] for error in refused] == ["3 requests in flight, 3 allowed"] * 2
        assert here.admission.held == 0


async def test_a_request_ends_at_its_deadline_wherever_it_is() -> None:
    """While it is computed or streams, a request over its time ends with its numbers, is aborted
    on every engine, and leaves nothing held; one that is quicker is not touched."""
    async with world() as here:
        for name, prompt, timeout_s in (("stream", 40, 1.0), ("prefill", 20_000, 0.5)):
            asked = request(name, range(prompt), 400)
            asked = replace(asked, context=replace(asked.context, timeout_s=timeout_s))
            began = here.now()
            with pytest.raises(DeadlineError, match=f"not done after {timeout_s:g} s"):
                await asyncio.create_task(here.ask(asked))
            assert here.now() - began == pytest.approx(timeout_s, abs=0.01)
            assert here.audit.records[-1].outcome == "deadline"
        quick = request("quick", range(40), 5)
        quick = replace(quick, context=replace(quick.context, timeout_s=30.0))
        assert await here.ask(quick) == answer(quick)
        await here.quiet()
        here.check()


async def test_a_burst_of_siblings_stays_together() -> None:
    """Requests that begin alike and come at once follow the first one to its replica instead of
    computing the same prefix on each: the prefix is computed once, not once a prefill replica."""
    async with world() as here:
        stem = list(range(4000))
        asked = [request(f"r{i}", [*stem, *range(9000 + i, 9040 + i)], 3) for i in range(5)]
        outcomes = await ask_all(here, random.Random(0), asked, 0.2)
        assert outcomes == [answer(one) for one in asked]
        assert len({record.plan.prefill for record in here.audit.records}) == 1
        computed = sum(record.computed_tokens() for record in here.audit.records)
        assert computed < 4000 + 5 * 100
        await here.quiet()
        here.check()


async def test_affinity_makes_no_hot_spot() -> None:
    """A holder with a long queue loses to a replica that computes the prefix anew."""
    async with world() as here:
        stem = list(range(640))
        first = request("first", stem, 2)
        assert await here.ask(first) == answer(first)
        rng = random.Random(5)
        asked = [
            request(f"r{i}", [*stem, *(rng.randrange(32_000) for _ in range(900))], 2)
            for i in range(30)
        ]
        outcomes = await ask_all(here, rng, asked, 0.1)
        assert outcomes == [answer(one) for one in asked]
        used = {record.plan.prefill or record.plan.decode for record in here.audit.records}
        assert {"prefill-0", "prefill-1"} <= used
        await here.quiet()
        here.check()


async def test_turns_of_a_session_keep_to_one_decode_replica() -> None:
    """Each `prompt_cache_key` has one decode replica, and not all have the same."""
    async with world(prefill=2, decode=3) as here:
        for turn in range(4):
            for session in range(6):
                name = f"s{session}.{turn}"
                prompt = [1000 * session + number for number in range(200 + 40 * turn)]
                asked = request(name, prompt, 2)
                context = RequestContext(name, cache_key=f"chat-{session}")
                await here.ask(replace(asked, context=context))
                await here.quiet()
        homes = {
            session: {
                record.plan.decode
                for record in here.audit.records
                if record.request_id.startswith(f"s{session}.")
            }
            for session in range(6)
        }
        assert all(len(replicas) == 1 for replicas in homes.values()), homes
        assert len(set.union(*homes.values())) > 1
        here.check()


async def test_a_stream_waits_a_little_for_its_only_replica() -> None:
    """Lost for a moment, with no other to go on at: the stream goes on where it stood once the
    replica has answered a probe; one that stays away ends it with an error in some seconds."""
    async with world(prefill=0, decode=1) as here:
        asked = request("r", range(100), 200)
        call = asyncio.create_task(here.ask(asked))
        await asyncio.sleep(1.0)
        here.engine("decode-0").hang()
        await asyncio.sleep(5.0)
        here.engine("decode-0").resume()
        assert await call == answer(asked)
        assert here.audit.records[-1].plans[-1].reason is Reason.DECODE_LOST
        await here.quiet()
        lost = asyncio.create_task(here.ask(request("lost", range(100), 200)))
        await asyncio.sleep(1.0)
        here.engine("decode-0").crash()
        began = here.now()
        with pytest.raises(RequestLostError, match="no other replica is up"):
            await lost
        assert here.now() - began < 10.0
