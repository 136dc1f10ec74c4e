"""The real router over simulated replicas: what every test of tests/sim builds on."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from kv.block import pack_tokens, split_keys
from router.admission import Admission
from router.audit import Audit, Log, Record
from router.catalogue.node import CatalogueNode
from router.catalogue.wire import Beat, Expect, Found, Taken
from router.context import RequestContext
from router.fleet import Fleet
from router.member import Member
from router.orders import Order
from router.pipeline import Pipeline
from router.planner import Planner, Prices
from router.policy import Policy
from router.policy.registry import CHOOSE, Choose
from router.pools import view_of
from router.request import Request
from router.settings import BatchBounds
from router.shadow import Shadow
from router.waiting import Room
from workers.messages import Inbox, Link, Replica, Role
from workers.sim import SimCluster, SimCosts, SimEngine, sim_answer, sim_body, sim_replica

COSTS = SimCosts()
BY_DEFAULT = Order()
BOUNDS = BatchBounds()
# Virtual seconds that a world may take: replicas beat for ever, so a deadlock shows as this
# timeout, within seconds of real time.
LIMIT_S = 3600.0
# One way of a question to the catalogue and back; a real one takes about as long.
LINE_S = 0.0002


class SimDirectory:
    """Who is announced; tests change the list. `down` makes it unreachable."""

    def __init__(self) -> None:
        self.announced: dict[str, Replica] = {}
        self.down = False

    async def replicas(self) -> Sequence[Replica]:
        if self.down:
            raise OSError("directory down")
        return tuple(self.announced.values())


class SimLine:
    """A line to the catalogue on the event loop's clock; `down` loses what is sent and asked."""

    def __init__(self, node: CatalogueNode, ingress: str) -> None:
        self._node, self._ingress = node, ingress
        self.down = False

    @property
    def up(self) -> bool:
        return not self.down

    async def look(self, keys: bytes) -> Found | None:
        await asyncio.sleep(LINE_S)
        if self.down:
            return None
        split = split_keys(keys)
        found = self._node.holdings.look(self._ingress, split)
        self._node.holdings.asked(split, found)
        return found

    def expect(self, expect: Expect) -> None:
        if not self.down:
            self._later(self._node.holdings.expect, expect)

    def met(self, name: str) -> None:
        if not self.down:
            self._later(self._node.holdings.met, name)

    @property
    def beat(self) -> Beat:
        return Beat() if self.down else self._node.beat()

    def _later(self, act: Callable[..., None], what: object) -> None:
        asyncio.get_running_loop().call_later(LINE_S, act, self._ingress, what)


class SilentObserver:
    """Counts nothing."""

    def refused(self, service_class: str, why: str) -> None: ...

    def planned(self, record: Record, decision_s: float) -> None: ...

    def token(self, record: Record, gap_s: float) -> None: ...

    def finished(self, record: Record) -> None: ...


@dataclass(slots=True)
class World:
    """One ingress's router and a catalogue over a simulated cluster."""

    cluster: SimCluster
    directory: SimDirectory
    node: CatalogueNode
    line: SimLine
    fleet: Fleet
    pipeline: Pipeline
    admission: Admission
    audit: Audit
    shadow: Shadow
    room: Room
    # What is in force; tests change it.
    order: Order
    costs: SimCosts = COSTS

    def start(self, name: str, role: Role, epoch: str = "1", **shape: object) -> SimEngine:
        """A replica, running and announced; one of the same name is replaced."""
        replica = sim_replica(name, role, self.costs, epoch=f"{name}/{epoch}", **shape)
        self.directory.announced[name] = replica
        return self.cluster.start(replica, self.costs)

    def engine(self, name: str) -> SimEngine:
        return self.cluster.engines[name]

    def ingress(self, name: str) -> "World":
        """A second ingress over the same cluster and catalogue; started with `watching`."""
        announced = self.directory.announced.values()
        prefill = any(replica.role is Role.PREFILL for replica in announced)
        over = (self.cluster, self.directory, self.node)
        return _world(*over, name, prefill, 10_000, self.costs, self.order, CHOOSE, BOUNDS)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator["World"]:
        """While the block lasts, the fleet follows who is there."""
        task = asyncio.create_task(self.fleet.watch())
        try:
            await self.warmed()
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.fleet.close()

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
        followed = {m.replica.epoch for m in self.node.roster.members() if m.up}
        return met and {replica.epoch for replica in announced} <= up & followed

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
        assert all(
            admission.held == 0 for admission in self.room.admissions(self.admission).values()
        )
        assert self.room.waiting == self.room.running == 0
        assert self.fleet.expected == 0
        self.check_rows()
        for member in self.fleet.members():
            assert member.requests == 0
            engine = self.cluster.engines[member.name]
            engine.check_integrity()
            assert idle(engine), engine.load()
            assert self.fleet.cached_blocks(member) == len(split_keys(engine.cached()))
            for key in split_keys(engine.cached()):
                assert member.replica.epoch in self.node.holdings.look("", [key]).depths

    def check_rows(self) -> None:
        """A snapshot shows every replica that is routable, as it is now."""
        snapshot = self.fleet.snapshot([], Found())
        for role, pool in ((Role.PREFILL, snapshot.prefill), (Role.DECODE, snapshot.decode)):
            up = self.fleet.up(role)
            staying = [member for member in up if not member.load.draining]
            routable = staying or (up if role is Role.DECODE else ())
            assert list(pool) == [view_of(member, Taken()) for member in routable]


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
    order: Order = BY_DEFAULT,
    shadows: Mapping[Policy, Choose] = CHOOSE,
    log: Log | None = None,
    bounds: BatchBounds = BOUNDS,
    **shape: object,
) -> AsyncIterator[World]:
    """A warmed world of replicas of this shape; when the block ends, no task that it started is
    left."""
    before = asyncio.all_tasks()
    async with asyncio.timeout(LIMIT_S), SimCluster() as cluster:
        directory = SimDirectory()
        now = asyncio.get_running_loop().time

        def follow(replica: Replica, inbox: Inbox) -> Link:
            return cluster.engines[replica.name].connect(inbox, "catalogue", follow=True)

        node = CatalogueNode(directory, follow, now)
        over = (cluster, directory, node)
        made = _world(*over, "ingress", prefill > 0, limit, costs, order, shadows, bounds, log)
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for index in range(count):
                made.start(f"{role}-{index}", role, kv_blocks=kv_blocks, **shape)
        following = asyncio.create_task(node.watch())
        try:
            async with made.watching():
                yield made
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    assert asyncio.all_tasks() == before


def _world(
    cluster: SimCluster,
    directory: SimDirectory,
    node: CatalogueNode,
    name: str,
    expects_prefill: bool,
    limit: int,
    costs: SimCosts,
    order: Order,
    shadows: Mapping[Policy, Choose],
    bounds: BatchBounds,
    log: Log | None = None,
) -> World:
    now = asyncio.get_running_loop().time

    def connect(replica: Replica, member: Member) -> Link:
        return cluster.engines[replica.name].connect(member, name)

    line = SimLine(node, name)
    rng = random.Random(name)
    fleet = Fleet(directory, connect, line, sim_body(1), now, rng, expects_prefill)
    audit = Audit(now, SilentObserver(), kept=100_000, log=log)
    admission = Admission(limit)
    shadow = Shadow(shadows)
    planner = Planner(fleet, Prices(), lambda: made.order)
    room = Room(fleet, bounds, now)
    pipeline = Pipeline(fleet, planner, shadow, admission, audit, now, room)
    parts = (cluster, directory, node, line, fleet, pipeline, admission, audit, shadow, room)
    made = World(*parts, order, costs)
    return made


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
