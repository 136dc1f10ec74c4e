"""Replicas on the event loop's clock: they say what real ones say, and compute nothing.

A `SimEngine` takes the messages of `workers.messages` and answers them as `workers.server` and
`workers.engine` do, in the time that its curves tell. Its tokens are a function of the prompt
whose KV it used, so that a wrong handoff, a lost token and a doubled one all show.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kv.catalogue import Tier
from kv.curve import LinkCurve
from workers import messages as wire
from workers.messages import Delta, FetchLoad, Handoff, Load, Replica, TierLoad
from workers.mirror import Change
from workers.sim_costs import SimCosts, sim_answer, sim_body, sim_replica
from workers.sim_fetch import Fetch, Lent
from workers.sim_link import SimLink
from workers.sim_run import Run
from workers.sim_steps import Steps
from workers.sim_vault import Shelf, SimVault

__all__ = ["SimCluster", "SimCosts", "SimEngine", "sim_answer", "sim_body", "sim_replica"]

# As the real server's.
SILENCE_S = 10.0
_BEAT_S = 0.25
_LOAD_EVERY_S = 1.0


class SimCluster:
    """Simulated engines that can read each other's KV; leaving the block stops them all."""

    def __init__(self) -> None:
        self.engines: dict[str, SimEngine] = {}
        self.vault = SimVault()
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

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that an engine does beside its steps."""
        return self._tasks.create_task(work)

    def lender(self, address: str) -> "SimEngine | None":
        """Who lends at this address."""
        engines = self.engines.values()
        return next((each for each in engines if each.replica.peer_address == address), None)

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
        self._computing: tuple[Run, float] | None = None
        self._fetches: dict[str, asyncio.Task[None]] = {}
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
        for task in (*self.tasks, *self._fetches.values()):
            task.cancel()

    def _new_steps(self) -> Steps:
        costs, cluster = self._costs, self._cluster
        shelf = None if costs.vault is None else Shelf(cluster.vault)
        sizes = costs.host_blocks, costs.chunk_tokens
        return Steps(self.replica, costs.lease_s, cluster.settle, *sizes, shelf)

    # ------------------------------------------------------------------ what tests look at

    def cached(self) -> bytes:
        """The keys of all blocks that can be found here, concatenated."""
        return self._steps.pages.snapshot()

    def load(self) -> Load:
        """How busy it is, and what its tiers hold."""
        steps, costs, tiers = self._steps, self._costs, {}
        if costs.host_blocks:
            tiers[Tier.HOST] = _told(len(steps.host), costs.host)
        if costs.vault is not None and steps.shelf is not None:
            # Others store there too, as with a real one.
            tiers[Tier.VAULT] = _told(len(steps.shelf), costs.vault, unnamed=1)
        peer = FetchLoad(costs.peer.latency_s, costs.peer.per_byte_s) if costs.lends else None
        return msgspec.structs.replace(steps.load(), tiers=tiers, peer=peer)

    def lent(self, work: str, keys: Sequence[bytes]) -> Lent | None:
        """What a peer that asks for blocks is told, as they are computed for the request `work`."""
        if self._crashed or not self._awake.is_set():
            return None
        if self._computing is not None:
            run, began_s = self._computing
            self._steps.computed(run, self._blocks_done(run, self._loop.time() - began_s))
        return self._steps.lent(work, keys)

    def _blocks_done(self, run: Run, seconds: float) -> int:
        """Leading blocks of a prompt that are there so long after computing a chunk of it began."""
        had, prefill = run.had_tokens, self._costs.prefill
        block_tokens = self.replica.block_tokens
        most = (had + self._steps.chunk(run)) // block_tokens

        def until(blocks: int) -> float:
            return prefill.seconds(max(0, blocks * block_tokens - had), had)

        return bisect_right(range(1, most + 1), seconds, key=until)

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
        if self._steps.shelf is not None:
            peer.sequence += 1
            stored = self._steps.shelf.snapshot()
            peer.link.tell(wire.Blocks(peer.sequence, stored, tier=Tier.VAULT))

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
            fetch = self._fetches.pop(request_id, None)
            if fetch is not None:
                fetch.cancel()
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
            if computes is not None:
                self._computing = computes, self._loop.time() + self._host_s(computes)
            await asyncio.sleep(self._step_s(computes))
            await self._awake.wait()
            self._computing = None
            self._report(self._steps.finish(computes, self._loop.time()))

    def _begin_step(self) -> Run | None:
        (arrived, self._arrived), now_s = (self._arrived, []), self._loop.time()
        for run in arrived:
            self._steps.loaded(run, now_s)
        computes, loading = self._steps.admit(now_s)
        if computes is not None:
            computes.loading_s += self._host_s(computes)
        for run in loading:
            if run.sought is not None:
                self._fetches[run.submit.request_id] = self._cluster.spawn(self._fetch(run))
                continue
            moved_bytes = (run.prompt_tokens - run.hit_tokens) * self.replica.kv_bytes_per_token
            self._loop.call_later(self._costs.link.seconds(moved_bytes), self._arrive, run)
        return computes

    def _step_s(self, computes: Run | None) -> float:
        if computes is None:
            return self._costs.step_s
        compute_s = self._costs.prefill.seconds(self._steps.chunk(computes), computes.had_tokens)
        return self._host_s(computes) + compute_s

    def _host_s(self, run: Run) -> float:
        """What it takes from the host tier takes so long, before the first of its chunks."""
        n_tokens = 0 if run.done_tokens else run.host_tokens - run.behind.total()
        n_bytes = n_tokens * self.replica.kv_bytes_per_token
        return self._costs.host.seconds(n_bytes) if n_bytes else 0.0

    async def _fetch(self, run: Run) -> None:
        """What a request waits for comes, or will not."""
        costs, replica = self._costs, self.replica
        assert run.sought is not None
        fetch = Fetch(
            run.sought,
            costs.peer,
            costs.vault or LinkCurve(0.0, 0.0),
            replica.block_tokens * replica.kv_bytes_per_token,
            costs.answer_s,
            self._cluster.lender,
            self._cluster.vault,
            self._awake,
        )
        brought = await fetch.run()
        del self._fetches[run.submit.request_id]
        self._steps.fetched(run, brought, self._loop.time())
        self._news.set()

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
        shelf = self._steps.shelf
        changes = [self._steps.pages.take(), self._steps.host.take()]
        for change in changes if shelf is None else (*changes, shelf.take()):
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


def _told(blocks: int, curve: LinkCurve, unnamed: int = 0) -> TierLoad:
    return TierLoad(blocks, unnamed, curve.latency_s, curve.per_byte_s)
