"""The router carries a split out on real replicas: P's head and D's own disk make one answer."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from kv.block import pack_tokens
from kv.catalogue import Tier
from kv.plan import Hints, Plan, Reason, Shape, Source, Span
from router.audit import Record
from router.catalogue.wire import Beat, Expect, Found
from router.context import RequestContext
from router.fleet import Fleet
from router.member import Member
from router.request import Request
from router.run import Attempt, run
from tests.flow.replica_process import SECRET, replicas
from tests.waiting import await_that
from workers.channel import ChannelLink
from workers.curve import client_keys
from workers.messages import Link, Replica

P, D = "prefill-0", "decode-0"
BLOCK = 32
N, HEAD, REACH = 12 * BLOCK + 5, 5 * BLOCK, 12 * BLOCK
PROMPT = pack_tokens([random.Random(1).randrange(1000, 40_000) for _ in range(N)])


class NoCatalogue:
    """A line to nobody."""

    up = False
    beat = Beat()

    async def look(self, keys: bytes) -> Found | None:
        return None

    def expect(self, expect: Expect) -> None: ...

    def met(self, name: str) -> None: ...


class Announced:
    """Who was started."""

    def __init__(self, pair: Sequence[Replica]) -> None:
        self._pair = pair

    async def replicas(self) -> Sequence[Replica]:
        return self._pair


def body(n_tokens: int) -> bytes:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from router.client import body_of

    params = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
    return body_of(EngineCoreRequest("x", None, None, params, None, 0.0, None, None, None))


@asynccontextmanager
async def fleet_of(pair: Sequence[Replica]) -> AsyncIterator[Fleet]:
    """Both are up while the block lasts."""

    def connect(replica: Replica, member: Member) -> Link:
        return ChannelLink(replica.address, "router", member, client_keys(SECRET))

    rng = random.Random(1)
    fleet = Fleet(Announced(pair), connect, NoCatalogue(), body(1), time.monotonic, rng, True)
    watching = asyncio.create_task(fleet.watch())
    try:
        async with asyncio.timeout(30):
            while not fleet.pairs.links:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield fleet
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        fleet.close()


async def answered(fleet: Fleet, plan: Plan, name: str) -> tuple[list[int], Record]:
    asked = Request(name, PROMPT, body(8), None, RequestContext(name))
    record = Record(name, "interactive", N, time.monotonic())
    tokens: list[int] = []
    async with asyncio.timeout(30), aclosing(run(fleet, _attempt(asked, plan), record)) as deltas:
        async for delta in deltas:
            tokens += delta.token_ids
    return tokens, record


def _attempt(asked: Request, plan: Plan) -> Attempt:
    keys = [b"%016d" % at for at in range(N // BLOCK)]
    return Attempt(asked, plan, f"{asked.request_id}.0", keys)


def local() -> Plan:
    spans = (Span(Source.COMPUTE, 0, N, D),)
    return Plan(Shape.LOCAL, Reason.CHEAPER_LOCAL, None, D, spans, 1.0, 1.0, ())


def split(prefill: Replica) -> Plan:
    spans = (
        Span(Source.COMPUTE, 0, HEAD, P),
        Span(Source.FETCH, HEAD, REACH, D, Tier.DISK),
        Span(Source.COMPUTE, REACH, N, D),
    )
    hints = Hints(REACH, (Tier.DISK,), 20.0, prefill.peer_address, HEAD, 10.0)
    return Plan(Shape.SPLIT, Reason.OVERLAP, P, D, spans, 1.0, 1.0, (), hints)


def on_disk(folder: Path) -> int:
    """Blocks that the disks below it hold, once no more come: some are of what introduces pairs."""
    before, now = -1, 0
    while now != before:
        time.sleep(1.0)
        before, now = now, sum(1 for _ in folder.rglob("*.kv"))
    return now


async def store(fleet: Fleet, name: str, plan: Plan) -> None:
    """Have P compute all of the prompt too: whichever disk a successor finds has its blocks."""
    from router.head import _submit

    asked = Request(name, PROMPT, body(8), None, RequestContext(name))
    whole = _submit(fleet, _attempt(asked, plan), Span(Source.COMPUTE, 0, REACH, P))
    member = fleet.member(P)
    assert member is not None
    async with member.run(whole) as deltas:
        async for delta in deltas:
            assert delta.handoff is None


async def test_a_split_is_one_answer_of_two_replicas(tiny_model: Path, tmp_path: Path) -> None:
    """As many tokens came from each as the plan says, nothing was handed off, P keeps no lease, and
    the answer is what D gave when it computed all."""
    tiers = {
        "host": {"bytes": 1 << 23},
        "peer": {"timeout_s": 1.0},
        "disk": {"path": str(tmp_path / "disk"), "bytes": 1 << 26},
    }
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    with replicas(tiny_model, first, tiers) as pair:
        assert all(each.peer_address and each.room_tokens == 128 * BLOCK for each in pair)
        async with fleet_of(pair) as fleet:
            whole, _ = await answered(fleet, local(), "whole")
            await store(fleet, "stored", local())
            # Both replicas' blocks: what is not on disk yet ends with its replica.
            await asyncio.to_thread(
                await_that, lambda: on_disk(tmp_path) >= 2 * REACH // BLOCK, "disk"
            )
    with replicas(tiny_model, second, tiers) as pair:
        async with fleet_of(pair) as fleet:
            tokens, record = await answered(fleet, split(pair[0]), "split")
            assert tokens == whole
            wanted = {"peer": HEAD, "disk": REACH - HEAD, "computed": N - REACH}
            assert record.sources() == {"prefill": {"computed": HEAD}, "decode": wanted}
            assert record.cached_tokens() == REACH - HEAD
            for member in fleet.members():
                assert member.load.leased == member.requests == 0
            decode = fleet.member(D)
            assert decode is not None
            totals = decode.load.totals
            assert (totals.failed_loads, totals.failed_transfers) == (0, 0)
