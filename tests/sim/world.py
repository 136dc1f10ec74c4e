"""The real router over simulated replicas: what every test of tests/sim builds on."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from kv.block import pack_tokens, split_keys
from router.admission import Admission
from router.audit import Audit, Record
from router.context import RequestContext
from router.fleet import Fleet
from router.pipeline import Pipeline
from router.request import Request
from workers.messages import Replica, Role
from workers.sim import SimCluster, SimCosts, SimEngine, sim_answer, sim_body, sim_replica

COSTS = SimCosts()
# Virtual seconds that a world may take: replicas beat for ever, so a deadlock shows as this
# timeout, within seconds of real time.
LIMIT_S = 3600.0


class SimDirectory:
    """Who is announced; tests change the list. `down` makes it unreachable."""

    def __init__(self) -> None:
        self.announced: dict[str, Replica] = {}
        self.down = False

    async def replicas(self) -> Sequence[Replica]:
        if self.down:
            raise OSError("directory down")
        return tuple(self.announced.values())


class SilentObserver:
    """Counts nothing."""

    def refused(self, service_class: str, why: str) -> None: ...

    def planned(self, record: Record, decision_s: float) -> None: ...

    def token(self, record: Record, gap_s: float) -> None: ...

    def finished(self, record: Record) -> None: ...


@dataclass(slots=True)
class World:
    """One ingress's router over a simulated cluster."""

    cluster: SimCluster
    directory: SimDirectory
    fleet: Fleet
    pipeline: Pipeline
    admission: Admission
    audit: Audit
    costs: SimCosts = COSTS

    def start(self, name: str, role: Role, epoch: str = "1", **shape: object) -> SimEngine:
        """A replica, running and announced; one of the same name is replaced."""
        replica = sim_replica(name, role, self.costs, epoch=f"{name}/{epoch}", **shape)
        self.directory.announced[name] = replica
        return self.cluster.start(replica, self.costs)

    def engine(self, name: str) -> SimEngine:
        return self.cluster.engines[name]

    async def warmed(self) -> None:
        """Returns when every pair is routable."""
        await self.quiet()
        while not self._introduced():
            await self.quiet()
        await self.quiet()  # the last introduction may have ended just now

    def _introduced(self) -> bool:
        announced = list(self.directory.announced.values())
        roles = [replica.role for replica in announced]
        pairs = roles.count(Role.PREFILL) * roles.count(Role.DECODE)
        up = {m.replica.epoch for m in self.fleet.members() if m.up and not m.requests}
        met = len(self.fleet.pairs.links) >= pairs and self.fleet.ready()
        return met and {replica.epoch for replica in announced} <= up

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def quiet(self) -> None:
        """Returns when no engine has work, and reports and replies have arrived."""
        while any(not idle(engine) for engine in self.cluster.engines.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.25)
        await asyncio.sleep(2.5)

    async def ask(self, request: Request) -> list[int]:
        """The tokens of one request; checks that it finishes once, and under its own id."""
        tokens, finished = [], 0
        async with aclosing(self.pipeline.serve(request)) as deltas:
            async for delta in deltas:
                assert delta.request_id == request.request_id
                assert delta.handoff is None
                tokens += delta.token_ids
                finished += delta.finish_reason is not None
        assert finished == 1
        return tokens

    def check(self) -> None:
        """Nothing is held anywhere, and the catalogue is what the engines hold."""
        assert self.admission.held == 0
        for member in self.fleet.members():
            assert member.requests == 0
            assert member.queued_tokens == 0, member.load
            engine = self.cluster.engines[member.name]
            engine.check_integrity()
            assert idle(engine), engine.load()
            assert self.fleet.cached_blocks(member) == len(split_keys(engine.cached()))
            for key in split_keys(engine.cached()):
                holders = {holder.replica for holder in self.fleet.catalogue.depths([key])}
                assert member.name in holders


def idle(engine: SimEngine) -> bool:
    load = engine.load()
    return load.waiting == load.running == load.leased == 0 and load.kv_usage == 0.0


@asynccontextmanager
async def world(
    prefill: int = 2,
    decode: int = 3,
    limit: int = 10_000,
    costs: SimCosts = COSTS,
    kv_blocks: int = 4096,
) -> AsyncIterator[World]:
    """A warmed world; when the block ends, no task that it started is left."""
    before = asyncio.all_tasks()
    async with asyncio.timeout(LIMIT_S), SimCluster() as cluster:
        directory = SimDirectory()
        now = asyncio.get_running_loop().time
        fleet = Fleet(
            directory,
            lambda replica, member: cluster.engines[replica.name].connect(member),
            sim_body(1),
            now,
            random.Random(0),
            expects_prefill=prefill > 0,
        )
        admission, audit = Admission(limit), Audit(now, SilentObserver(), kept=100_000)
        pipeline = Pipeline(fleet, admission, audit, now, 0.5)
        made = World(cluster, directory, fleet, pipeline, admission, audit, costs)
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for index in range(count):
                made.start(f"{role}-{index}", role, kv_blocks=kv_blocks)
        watching = asyncio.create_task(fleet.watch())
        try:
            await made.warmed()
            yield made
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            fleet.close()
    assert asyncio.all_tasks() == before


def request(name: str, token_ids: Sequence[int], max_tokens: int, **fields: object) -> Request:
    """A request whose prompt is `token_ids`."""
    tokens, context = pack_tokens(token_ids), RequestContext(name)
    return Request(name, tokens, sim_body(max_tokens), None, context, **fields)


def answer(asked: Request) -> list[int]:
    """What it must be answered."""
    return sim_answer(asked.tokens, int(asked.body))


class Prompts:
    """Random prompts of which many begin alike."""

    def __init__(self, rng: random.Random, families: int = 12) -> None:
        self._rng = rng
        self._stems = [self._tokens(rng.randrange(16, 1200)) for _ in range(families)]

    def _tokens(self, n: int) -> list[int]:
        return [self._rng.randrange(32_000) for _ in range(n)]

    def next(self, name: str) -> Request:
        stem = self._rng.choice(self._stems)
        shared = stem[: self._rng.randrange(len(stem) + 1)]
        prompt = shared + self._tokens(self._rng.randrange(1, 60))
        return request(name, prompt, self._rng.randrange(1, 12))
