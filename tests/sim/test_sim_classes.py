"""Batch requests beside interactive ones: people do not notice them, and they come to an end."""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import pytest

from kv.curve import PrefillCurve
from router.context import Bound, Notes, RequestContext, ServiceClass
from router.errors import DeadlineError, RoomFullError
from router.request import Request
from router.settings import BatchBounds
from tests.sim.world import COSTS, World, answer, request, world
from workers.messages import Keep, Role, Spent

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

# 1,000 tokens take 0.53 s in one piece, and 0.08 s a chunk.
CHUNKED = replace(COSTS, chunk_tokens=128)
AGE_S = 30.0
BOUNDS = BatchBounds(max_age_s=AGE_S)


def batch(name: str, token_ids: Sequence[int], max_tokens: int, **fields: object) -> Request:
    """As the ingress makes it of a body with `service_tier: flex`."""
    asked = request(name, token_ids, max_tokens, keep=Keep(yields=True))
    context = RequestContext(name, service_class=ServiceClass.BATCH, **fields)  # type: ignore[arg-type]
    return replace(asked, context=context)


def unique(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(32_000) for _ in range(tokens)]


async def took(here: World, asked: Request) -> float:
    """Seconds until a request is answered, rightly."""
    began = here.now()
    assert await here.ask(asked) == answer(asked)
    return here.now() - began


async def test_idle_engines_begin_a_batch_request_at_once() -> None:
    """It takes as long as an interactive one, its answer is right, and nothing is left."""
    async with world(prefill=1, decode=1) as here:
        alone = await took(here, request("a", range(1000), 5))
        await here.quiet()
        assert await took(here, batch("b", range(2000, 3000), 5)) == pytest.approx(alone, rel=0.1)
        assert {record.service_class for record in here.audit.records} == {"interactive", "batch"}
        await here.quiet()
        here.check()


async def crowd(here: World, until_s: float, clients: int = 4) -> int:
    """People who ask one long prompt after the other: somebody waits at every moment."""
    rng, asked = random.Random(3), 0

    async def client(number: int) -> None:
        nonlocal asked
        while here.now() < until_s:
            asked += 1
            prompt = request(f"person-{number}-{asked}", unique(rng, 800), 2)
            assert await here.ask(prompt) == answer(prompt)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return asked


def spent_by(here: World, service_class: str) -> Spent:
    """What the only decode replica told of the last request of a class."""
    records = [each for each in here.audit.records if each.service_class == service_class]
    assert records[-1].decode_spent is not None
    return records[-1].decode_spent


async def test_seconds_of_a_batch_prompt_are_of_all_its_chunks() -> None:
    """With those in which it stood still for a person's prompt, which is told; the person's do not
    hold its chunks."""
    async with world(prefill=0, decode=1, costs=CHUNKED) as here:
        asked = asyncio.create_task(took(here, batch("b", range(1000), 2)))
        await asyncio.sleep(0.2)
        await took(here, request("person", range(2000, 2800), 2))
        await asked
        spent, prefill = spent_by(here, "batch"), CHUNKED.prefill
        chunks = [(min(128, 1000 - at), at) for at in range(0, 1000, 128)]
        computing_s = sum(prefill.seconds(*chunk) for chunk in chunks) + prefill.seconds(800, 0)
        assert spent.others_tokens == 800
        assert spent.queued_s == pytest.approx(0.0, abs=0.001)
        assert spent.loading_s == 0.0
        assert spent.computing_s >= computing_s - 1e-6
        assert spent_by(here, "interactive").others_tokens == 0
        await here.quiet()
        here.check()


async def test_a_batch_prompt_waits_for_the_host_tier_once() -> None:
    """Before the first of its chunks."""
    async with world(prefill=0, decode=1, costs=replace(CHUNKED, host_blocks=1000)) as here:
        engine = here.engine("decode-0")
        await took(here, request("a", range(1040), 1))
        await here.quiet()
        engine._steps.pages.clear()
        await asyncio.sleep(1.0)
        await took(here, batch("b", [*range(1024), *range(5000, 6000)], 1))
        spent = spent_by(here, "batch")
        assert spent.loaded_bytes == 1024 * engine.replica.kv_bytes_per_token
        assert spent.loading_s == pytest.approx(CHUNKED.host.seconds(spent.loaded_bytes))
        assert spent.others_tokens == 0
        await here.quiet()
        here.check()


async def test_the_audit_tells_how_long_a_batch_request_waited_for_its_turn() -> None:
    """Apart from its seconds on engines, which begin with its plan; a person waits for no turn."""
    async with world(prefill=0, decode=1, costs=CHUNKED) as here:
        person = asyncio.create_task(took(here, request("person", range(1000), 2)))
        await asyncio.sleep(0.1)
        took_s = await took(here, batch("b", range(2000, 2600), 2))
        await person
        of_person, of_batch = here.audit.records
        assert of_person.waited_s == 0.0
        assert of_batch.waited_s > 0.3
        assert of_batch.ended_at is not None
        ran_s = of_batch.ended_at - of_batch.started_at
        assert of_batch.waited_s + ran_s == pytest.approx(took_s, abs=0.01)
        await here.quiet()
        here.check()


async def test_batch_requests_move_no_curve() -> None:
    """They take as long as others let them; interactive ones tell how fast a replica is."""
    async with world(prefill=0, decode=1) as here:
        member = here.fleet.member("decode-0")
        assert member is not None
        rng = random.Random(5)
        await took(here, request("warm", unique(rng, 1000), 1))
        await asyncio.sleep(1.0)
        before = member.speed
        here.engine("decode-0").become(replace(COSTS, prefill=PrefillCurve(0.1, 0.002, 1e-8)))
        for number in range(5):
            await took(here, batch(f"b{number}", unique(rng, 900), 1))
        await asyncio.sleep(1.0)
        assert member.speed == before
        for number in range(5):
            await took(here, request(f"i{number}", unique(rng, 800), 1))
        await asyncio.sleep(1.0)
        assert member.speed != before
        await here.quiet()
        here.check()


@pytest.mark.parametrize("prefill", [0, 1])
async def test_age_bounds_the_wait_under_endless_load(prefill: int) -> None:
    """Prefill never has a free moment for a hundred seconds: batch requests wait for as long as
    they may, then are run as any request is, and people go on being served meanwhile."""
    async with world(prefill=prefill, decode=1, bounds=BOUNDS, costs=CHUNKED) as here:
        began = here.now()
        people = asyncio.create_task(crowd(here, began + 100.0))
        await asyncio.sleep(2.0)
        rng = random.Random(4)
        asked = [batch(f"b{number}", unique(rng, 600), 3) for number in range(5)]
        waited = await asyncio.gather(*(took(here, each) for each in asked))
        assert min(waited) >= AGE_S
        # Five of them, each behind the people who came before it.
        assert max(waited) <= AGE_S + 15.0
        assert await people > 100
        await here.quiet()
        here.check()


@pytest.mark.parametrize("prefill", [0, 1])
async def test_age_bounds_the_wait_inside_an_engine_too(prefill: int) -> None:
    """A batch prompt that was begun in a quiet moment, and that people then overtake without an
    end, is computed once it is as old as it may be."""
    async with world(prefill=prefill, decode=1, bounds=BOUNDS, costs=CHUNKED) as here:
        asked = batch("b", unique(random.Random(5), 8000), 3)
        under_way = asyncio.create_task(took(here, asked))
        await asyncio.sleep(0.5)
        people = asyncio.create_task(crowd(here, here.now() + 80.0))
        assert AGE_S <= await under_way <= AGE_S + 15.0
        await people
        await here.quiet()
        here.check()


async def test_a_batch_prompt_gives_way_within_a_chunk() -> None:
    """An interactive request that comes while 8,000 batch tokens are computed waits for the chunk
    that is under way, and no longer; the batch prompt goes on where it was."""
    async with world(prefill=1, decode=1, costs=CHUNKED) as here:
        alone = await took(here, request("alone", range(5000, 5800), 2))
        await here.quiet()
        long = batch("b", unique(random.Random(6), 8000), 2)
        began = here.now()
        under_way = asyncio.create_task(took(here, long))
        await asyncio.sleep(1.0)
        chunk_s = CHUNKED.prefill.seconds(128, 8000)
        assert await took(here, request("p", range(6000, 6800), 2)) <= alone + chunk_s + 0.05
        await under_way
        computed_s = sum(CHUNKED.prefill.seconds(128, at) for at in range(0, 8000, 128))
        assert here.now() - began <= computed_s + alone + 1.0
        await here.quiet()
        here.check()


@dataclass(slots=True)
class Load:
    """Interactive requests by their arrival."""

    arrivals: list[tuple[float, Request]]

    async def offered(self, here: World) -> None:
        began = here.now()

        async def one(at_s: float, asked: Request) -> None:
            await asyncio.sleep(began + at_s - here.now())
            assert await here.ask(asked) == answer(asked)

        await asyncio.gather(*(one(*arrival) for arrival in self.arrivals))


def people(
    rng: random.Random, seconds: float, rate: float, prompt: Callable[[], list[int]]
) -> Load:
    """Open-loop arrivals, exponentially apart."""
    arrivals, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        arrivals.append((at_s, request(f"p{len(arrivals)}", prompt(), 8)))
    return Load(arrivals)


def strangers(seconds: float) -> Load:
    """Prompts of 1,000 tokens that nobody shares, one in two seconds."""
    rng = random.Random(7)
    return people(rng, seconds, 0.5, lambda: unique(rng, 1000))


def conversations(seconds: float) -> Load:
    """Turns of twelve conversations, in any order."""
    rng = random.Random(8)
    turns = [unique(rng, 400) for _ in range(12)]

    def prompt() -> list[int]:
        at = rng.randrange(len(turns))
        turns[at] = [*turns[at], *unique(rng, 24)]
        return turns[at]

    return people(rng, seconds, 0.6, prompt)


async def background(here: World, until_s: float, tokens: int = 1500) -> int:
    """Batch requests without an end, as many at a time as the room holds; those that are done."""
    rng, done = random.Random(9), 0

    async def client(number: int) -> None:
        nonlocal done
        while here.now() < until_s:
            asked = batch(f"bg-{number}-{rng.random()}", unique(rng, tokens), 8)
            assert await here.ask(asked) == answer(asked)
            done += here.now() <= until_s

    await asyncio.gather(*(client(number) for number in range(16)))
    return done


def ttfts(here: World) -> list[float]:
    records = (record for record in here.audit.records if record.request_id.startswith("p"))
    return sorted(record.ttft_s for record in records if record.ttft_s is not None)


async def test_people_do_not_notice_background_work() -> None:
    """The same arrivals with and without batch requests beside them: the 95th percentile of their
    time to first token grows by a quarter at most, and batch requests get four fifths of what
    people leave."""
    seconds, p95 = 300.0, []
    done = saturated = 0
    for beside in (False, True):
        load = strangers(seconds)
        async with world(prefill=1, decode=1, costs=CHUNKED) as here:
            work = [load.offered(here)]
            if beside:
                done, _ = await asyncio.gather(background(here, here.now() + seconds), *work)
            else:
                await asyncio.gather(*work)
            found = ttfts(here)
            p95.append(found[int(0.95 * len(found))])
            await here.quiet()
            here.check()
    async with world(prefill=1, decode=1, costs=CHUNKED) as here:
        saturated = await background(here, here.now() + seconds)
    taken = sum(CHUNKED.prefill.seconds(1000, 0) for _ in load.arrivals) / seconds
    assert p95[1] <= 1.25 * p95[0], p95
    assert done >= 0.8 * (1.0 - taken) * saturated, (done, saturated, taken)


@pytest.mark.parametrize("host_blocks", [0, 1200])
async def test_people_s_cache_hits_stay(host_blocks: int) -> None:
    """Conversations over a cache that holds most of them, with and without batch requests whose
    prompts nobody shares: the share of their tokens that is cached changes by 2 % at most."""
    shares = []
    for beside in (False, True):
        load = conversations(200.0)
        costs = replace(CHUNKED, host_blocks=host_blocks)
        async with world(prefill=0, decode=1, costs=costs, kv_blocks=900) as here:
            work = [load.offered(here)]
            if beside:
                work.append(background(here, here.now() + 200.0, 600))  # type: ignore[arg-type]
            await asyncio.gather(*work)
            records = [r for r in here.audit.records if r.request_id.startswith("p")]
            cached = sum(record.cached_tokens() for record in records)
            shares.append(cached / sum(record.prompt_tokens for record in records))
            await here.quiet()
            here.check()
    assert shares[0] > 0.5
    assert shares[1] >= shares[0] * 0.98, shares


async def test_a_full_room_refuses_and_people_still_enter() -> None:
    """Both limits are apart: neither class takes the other's places."""
    bounds = BatchBounds(max_requests=2)
    async with world(prefill=1, decode=1, limit=1, bounds=bounds) as here:
        clients = [asyncio.create_task(here.ask(batch(f"b{n}", range(900), 40))) for n in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(RoomFullError, match=r"2 batch requests .* wait or run, 2 allowed"):
            await here.ask(batch("b2", range(900), 2))
        asked = Bound(RequestContext("b3", service_class=ServiceClass.BATCH), Notes())
        with pytest.raises(RoomFullError):
            here.pipeline.check(1, asked)
        person = request("p", range(100), 2)
        here.pipeline.check(1)
        assert await here.ask(person) == answer(person)
        await asyncio.gather(*clients)
        await here.quiet()
        here.check()


async def test_who_leaves_the_room_holds_nothing() -> None:
    """A client that goes while it waits, one whose time is over, and one that goes just as its
    turn has come: the others are begun all the same."""
    async with world(prefill=1, decode=1, bounds=BOUNDS, costs=CHUNKED) as here:
        people = asyncio.create_task(crowd(here, here.now() + 20.0))
        await asyncio.sleep(1.0)
        leaves = asyncio.create_task(here.ask(batch("leaves", range(500), 2)))
        stays = asyncio.create_task(took(here, batch("stays", range(1000, 1500), 2)))
        with pytest.raises(DeadlineError, match=r"not done after 3 s"):
            await here.ask(batch("late", range(500), 2, timeout_s=3.0))
        assert here.room.waiting == 2
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        assert here.room.waiting == 1
        await stays
        await people
        going = asyncio.create_task(here.ask(batch("going", range(2000, 2500), 2)))
        await asyncio.sleep(0)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        await here.quiet()
        here.check()


async def test_its_time_counts_what_it_waited() -> None:
    """A batch request that was begun late has what is left of its time, not all of it."""
    async with world(prefill=1, decode=1, bounds=BatchBounds(max_age_s=4.0)) as here:
        people = asyncio.create_task(crowd(here, here.now() + 20.0))
        await asyncio.sleep(1.0)
        began = here.now()
        with pytest.raises(DeadlineError, match=r"not done after 5 s"):
            await here.ask(batch("b", range(500), 400, timeout_s=5.0))
        assert here.now() - began == pytest.approx(5.0, abs=0.1)
        await people
        await here.quiet()
        here.check()


async def test_a_batch_request_survives_its_replica() -> None:
    """It is planned again, still as one that gives way."""
    async with world(prefill=1, decode=2, costs=CHUNKED) as here:
        asked = batch("b", range(1500), 60)
        under_way = asyncio.create_task(here.ask(asked))
        await asyncio.sleep(2.0)
        [record] = here.audit.records
        name = record.plan.decode
        here.engine(name).crash()
        here.start(name, Role.DECODE, epoch="2")
        assert await under_way == answer(asked)
        assert len(record.plans) > 1
        await here.warmed()
        here.check()


async def test_two_ingresses_see_each_other_s_people() -> None:
    """Each decides for itself: while people wait at one, the other begins no batch request."""
    async with world(prefill=1, decode=1, bounds=BOUNDS, costs=CHUNKED) as here:
        async with here.ingress("other").watching() as other:
            people = asyncio.create_task(crowd(here, here.now() + 15.0))
            await asyncio.sleep(2.0)
            asked = batch("b", range(500), 2)
            began = here.now()
            async with aclosing(other.pipeline.serve(asked)) as deltas:
                async for _ in deltas:
                    pass
            assert here.now() - began > 10.0
            await people
            await here.quiet()
            other.check()
        here.check()


async def test_batch_requests_spread_over_idle_replicas() -> None:
    """Two that come at once are computed on two prefill replicas, though neither counts as a queue
    to people."""
    async with world(prefill=2, decode=1, costs=CHUNKED) as here:
        rng = random.Random(10)
        asked = [batch(f"b{number}", unique(rng, 2000), 2) for number in range(2)]
        await asyncio.gather(*(here.ask(each) for each in asked))
        assert len({record.plan.prefill for record in here.audit.records}) == 2
        await here.quiet()
        here.check()


def test_the_curve_of_these_tests_is_known() -> None:
    """The figures above are made for it."""
    assert COSTS.prefill == PrefillCurve(0.02, 0.0005, 1e-8)
