"""Replicas on the event loop's clock: they say what real ones say, and compute nothing.

A `SimEngine` takes the messages of `workers.messages` and answers them as `workers.server` and
`workers.engine` do, in the time that its curves tell. Its tokens are a function of the prompt
whose KV it used, so that a wrong handoff, a lost token and a doubled one all show.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from workers import messages as wire
from workers.messages import Delta, Handoff, Load, Replica, Role, TierLoad
from workers.mirror import Change
from workers.sim_link import SimLink
from workers.sim_steps import Run, Steps, sim_token

# As the real server's.
SILENCE_S = 10.0
_BEAT_S = 0.25
_LOAD_EVERY_S = 1.0
# Any fit through these points gives the curve back.
_SAMPLED = ((32, 0), (512, 0), (2048, 0), (512, 2048))
PREFILL = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.005, 1e-9)
HOST = LinkCurve(0.005, 5e-10)


@dataclass(frozen=True, slots=True)
class SimCosts:
    """How long things take on one simulated engine; `link` is what reading a handoff costs, `host`
    what fetching from its host tier of `host_blocks` costs. Prompts that give way are computed by
    `chunk_tokens`."""

    prefill: PrefillCurve = PREFILL
    link: LinkCurve = LINK
    step_s: float = 0.02
    lease_s: float = 30.0
    host: LinkCurve = HOST
    host_blocks: int = 0
    chunk_tokens: int = 512


def sim_body(max_tokens: int, salt: str = "") -> bytes:
    """What to ask of a simulated engine: an answer of so many tokens, and a salt if any."""
    return f"{max_tokens} {salt}".strip().encode()


def sim_answer(tokens: bytes, n_tokens: int) -> list[int]:
    """The only right answer to a prompt of packed tokens."""
    digest = xxh3_64_intdigest(tokens)
    return [sim_token(digest, position) for position in range(n_tokens)]


def sim_replica(name: str, role: Role, costs: SimCosts, **shape: Any) -> Replica:
    """How a simulated engine announces itself; `shape` replaces fields of `Replica`."""
    fields: dict[str, Any] = {
        "epoch": f"{name}/1",
        "address": f"sim://{name}",
        "node": "sim",
        "pid": 0,
        "model": "sim",
        "block_tokens": 16,
        "kv_bytes_per_token": 46_080,
        "kv_blocks": 4096,
        "max_num_seqs": 64,
        "prefill_samples": tuple((*at, costs.prefill.seconds(*at)) for at in _SAMPLED),
        "step_s": costs.step_s,
    }
    return Replica(name=name, role=role, **{**fields, **shape})


class SimCluster:
    """Simulated engines that can read each other's KV; leaving the block stops them all."""

    def __init__(self) -> None:
        self.engines: dict[str, SimEngine] = {}
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> "SimCluster":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        for engine in self.engines.values():
            engine.stop()
        await self._tasks.__aexit__(*error)

    def start(self, replica: Replica, costs: SimCosts) -> "SimEngine":
        """A new engine; it replaces a crashed one of the same name."""
        engine = SimEngine(replica, costs, self)
        engine.tasks = [self._tasks.create_task(work) for work in (engine.step(), engine.beat())]
        self.engines[replica.name] = engine
        return engine

    def settle(self, handoff: Handoff) -> int | None:
        """End the lease behind a handoff; the digest of its prompt, None if there is no lease."""
        engine = self.engines.get(handoff["remote_engine_id"])
        if engine is None or engine.replica.epoch != handoff["remote_epoch"]:
            return None
        return engine.end_lease(handoff["remote_request_id"])


@dataclass(slots=True, eq=False)
class _Peer:
    """One connected ingress."""

    link: SimLink
    heard_at: float
    sequence: int = 0
    following: bool = False
    requests: set[str] = field(default_factory=set)


class SimEngine:
    """One simulated replica; made by `SimCluster.start`."""

    def __init__(self, replica: Replica, costs: SimCosts, cluster: SimCluster) -> None:
        self.replica, self._costs, self._cluster = replica, costs, cluster
        self.tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._steps = self._new_steps()
        self._arrived: list[Run] = []
        self._peers: dict[SimLink, _Peer] = {}
        self._news, self._awake = asyncio.Event(), asyncio.Event()
        self._awake.set()
        self._mail: list[tuple[SimLink, wire.Request]] = []
        self._load_sent = (Load(), 0.0)
        self._crashed = False
        self.readable = True
        self._refusals = 0

    def connect(self, inbox: wire.Inbox, ingress: str = "ingress", follow: bool = False) -> SimLink:
        """A link to this engine; with `follow` its blocks are told too."""
        return SimLink(wire.Hello(ingress, follow), inbox, self._hear)

    # ------------------------------------------------------------------ faults

    def crash(self) -> None:
        """Die: nothing is ever said or done again, and its KV is gone."""
        self.stop()
        self._crashed = True
        self._peers.clear()
        self._steps = self._new_steps()

    def hang(self, readable: bool = True) -> None:
        """Stop as SIGSTOP does: mail piles up. Peers can still read the memory, unless the
        transport needs this process to send it, as TCP does: their reads stand still then."""
        self.readable = readable
        self._awake.clear()

    def resume(self) -> None:
        """Go on after `hang`."""
        mail, self._mail = self._mail, []
        self.readable = True
        self._awake.set()
        for link, request in mail:
            self._hear(link, request)

    def become(self, costs: SimCosts) -> None:
        """Take as long as these costs tell from now on."""
        self._costs = costs

    def refuse_next(self, n: int) -> None:
        """Answer the next `n` requests with an error."""
        self._refusals = n

    def stop(self) -> None:
        """End its tasks."""
        for task in self.tasks:
            task.cancel()

    # ------------------------------------------------------------------ what tests look at

    def cached(self) -> bytes:
        """The keys of all blocks that can be found here, concatenated."""
        return self._steps.pages.snapshot()

    def load(self) -> Load:
        """How busy it is, and what its host tier holds."""
        load, costs = self._steps.load(), self._costs
        if not costs.host_blocks:
            return load
        host = TierLoad(len(self._steps.host), 0, costs.host.latency_s, costs.host.per_byte_s)
        return msgspec.structs.replace(load, tiers={Tier.HOST: host})

    def check_integrity(self) -> None:
        """Raise unless requests and leases hold exactly the pages that are held."""
        self._steps.check()

    # ------------------------------------------------------------------ what comes in

    def _hear(self, link: SimLink, request: wire.Request) -> None:
        if self._crashed:
            return
        if not self._awake.is_set():
            self._mail.append((link, request))
            return
        peer = self._peers.get(link)
        match request:
            case wire.Hello(follow=follow):
                self._hello(link, peer, follow)
            case wire.Resync() if peer is not None:
                self._snapshot(peer)
            case wire.Submit() if peer is not None:
                self._submit(request, peer)
            case wire.Abort(request_ids=request_ids):
                self._abort(request_ids)
            case wire.Release(handoff=handoff):
                self._cluster.settle(handoff)
            case wire.Reset():
                self._steps.pages.clear()
                self._steps.host.clear()
                self._report([])
            case wire.Forget(order_id=order_id, tags=tags):
                blocks, in_use = self._steps.erase(tags, self._loop.time())
                self._report([])
                link.tell(wire.Forgotten(order_id, blocks, in_use))

    def _hello(self, link: SimLink, peer: _Peer | None, follow: bool) -> None:
        if peer is not None:
            peer.heard_at = self._loop.time()
            return
        peer = self._peers[link] = _Peer(link, self._loop.time())
        link.tell(wire.Welcome(self.replica))
        link.tell(self.load())
        if follow:
            self._snapshot(peer)

    def _snapshot(self, peer: _Peer) -> None:
        self._report([])  # pending changes are part of the snapshot, not news after it
        peer.following = True
        peer.link.tell(wire.Blocks(peer.sequence, stored=self.cached(), snapshot=True))
        if self._costs.host_blocks:
            peer.sequence += 1
            stored = self._steps.host.snapshot()
            peer.link.tell(wire.Blocks(peer.sequence, stored, tier=Tier.HOST))

    def _submit(self, submit: wire.Submit, peer: _Peer) -> None:
        refused, self._refusals = self._refusals > 0, max(0, self._refusals - 1)
        if refused or not self._steps.add(submit, self._loop.time()):
            refusal = Delta(submit.request_id, [], finish_reason="error", error="refused")
            peer.link.tell(wire.Step([refusal]))
            return
        peer.requests.add(submit.request_id)
        self._news.set()

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._steps.abort(request_id)
        self._news.set()

    def end_lease(self, request_id: str) -> int | None:
        """A decode replica has read this prefill, or never will."""
        self._news.set()
        return self._steps.end_lease(request_id)

    # ------------------------------------------------------------------ time

    async def step(self) -> None:
        """Until cancelled: step while there is something to do."""
        while True:
            await self._awake.wait()
            computes = self._begin_step()
            if computes is None and not self._steps.streams:
                self._news.clear()
                await self._news.wait()
                continue
            await asyncio.sleep(self._step_s(computes))
            await self._awake.wait()
            self._report(self._steps.finish(computes, self._loop.time()))

    def _begin_step(self) -> Run | None:
        (arrived, self._arrived), now_s = (self._arrived, []), self._loop.time()
        for run in arrived:
            self._steps.loaded(run, now_s)
        computes, loading = self._steps.admit(now_s)
        if computes is not None:
            computes.loading_s += self._host_s(computes)
        for run in loading:
            moved_bytes = (run.prompt_tokens - run.hit_tokens) * self.replica.kv_bytes_per_token
            self._loop.call_later(self._costs.link.seconds(moved_bytes), self._arrive, run)
        return computes

    def _new_steps(self) -> Steps:
        costs = self._costs
        settle, sizes = self._cluster.settle, (costs.host_blocks, costs.chunk_tokens)
        return Steps(self.replica, costs.lease_s, settle, *sizes)

    def _step_s(self, computes: Run | None) -> float:
        if computes is None:
            return self._costs.step_s
        held_tokens = computes.hit_tokens + computes.host_tokens + computes.done_tokens
        compute_s = self._costs.prefill.seconds(self._steps.chunk(computes), held_tokens)
        return self._host_s(computes) + compute_s

    def _host_s(self, run: Run) -> float:
        """What it takes from the host tier takes so long, before the first of its chunks."""
        n_bytes = 0 if run.done_tokens else run.host_tokens * self.replica.kv_bytes_per_token
        return self._costs.host.seconds(n_bytes) if n_bytes else 0.0

    def _arrive(self, run: Run) -> None:
        source = self._cluster.engines.get((run.handoff or {}).get("remote_engine_id", ""))
        if source is not None and not source.readable:
            self._loop.call_later(_BEAT_S, self._arrive, run)
            return
        self._arrived.append(run)
        self._news.set()

    async def beat(self) -> None:
        """Until cancelled: end leases that are over, drop silent peers, tell the load."""
        while True:
            await asyncio.sleep(_BEAT_S)
            await self._awake.wait()
            now_s = self._loop.time()
            self._steps.expire(now_s)
            for peer in [p for p in self._peers.values() if now_s - p.heard_at > SILENCE_S]:
                del self._peers[peer.link]
                self._abort(list(peer.requests))
            self._report([])
            self._tell_load(now_s)

    # ------------------------------------------------------------------ what goes out

    def _report(self, deltas: list[Delta]) -> None:
        for peer in self._peers.values():
            own = [delta for delta in deltas if delta.request_id in peer.requests]
            if own:
                peer.link.tell(wire.Step(own))
                peer.requests.difference_update(d.request_id for d in own if d.finish_reason)
        for change in (self._steps.pages.take(), self._steps.host.take()):
            if change.stored or change.removed:
                self._tell_blocks(change)

    def _tell_blocks(self, change: Change) -> None:
        for peer in self._peers.values():
            if peer.following:
                peer.sequence += 1
                blocks = wire.Blocks(peer.sequence, change.stored, change.removed, tier=change.tier)
                peer.link.tell(blocks)

    def _tell_load(self, now_s: float) -> None:
        load, (last, sent_at) = self.load(), self._load_sent
        if load != last or now_s - sent_at >= _LOAD_EVERY_S:
            self._load_sent = (load, now_s)
            for peer in self._peers.values():
                peer.link.tell(load)
