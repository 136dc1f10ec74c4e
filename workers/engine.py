"""One vLLM EngineCore, stepped on a thread of its own.

The engine lives in the replica's process: no second process, no socket between the two, half the
memory of vLLM's own three-process layout and half its start (FACTS: 10 s against 24). The step
loop follows vLLM's `EngineCoreProc.run_busy_loop`; the contract test in tests/flow holds the
attributes used here to the pinned version.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.distributed.kv_events import EventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.request import Request, RequestStatus

from kv.catalogue import Tier
from kv.errors import DiskError
from kv.geometry import Geometry
from kv.live import RETRY_S
from kv.plan import Hints
from kv.salt import tag_of
from workers import erasure, pages, work
from workers.backlog import Backlog
from workers.carry import advance_grammar
from workers.classes import Classes
from workers.connector import lease_s, trusted_s
from workers.counters import Counters, with_tiers, without_connectors
from workers.erasure import Erased, Erasure
from workers.events import MirrorEvents
from workers.first_to_go import FirstToGo, step_pages
from workers.messages import Delta, Keep, Load, TierLoad
from workers.mirror import Change
from workers.peer.keys import PeerKeys
from workers.peer.tier import PeerTier
from workers.stopwatch import Stopwatch
from workers.tiers import keep_of, with_hints
from workers.vault.tier import VaultTier

logger = init_logger(__name__)

# Pauses between steps that computed nothing: short while a request waits for KV in flight (it is
# on that request's path), longer while only finished prefills wait to be read. Looking every
# millisecond costs a core that somebody else may compute with, so who has waited for long is
# looked at after a share of that. Orders end a pause.
_WAITING_PAUSE_S, _MOST_PAUSE_S, _PAUSE_SHARE = 0.001, 0.01, 0.02
_LEASED_PAUSE_S = 0.005
_RECEIVING = (RequestStatus.WAITING_FOR_REMOTE_KVS,)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step produced; handed to the listener on the engine's thread."""

    deltas: list[Delta]
    changes: tuple[Change, ...]
    load: Load


class Engine:
    """A running engine. `add` and `abort` may be called from one other thread. Tiers that became
    slow are tried again after about `retry_s` (`kv.live`)."""

    def __init__(
        self,
        config: VllmConfig,
        listener: Callable[[StepReport], None],
        retry_s: float | None = RETRY_S,
    ) -> None:
        self._core = EngineCore(config, Executor.get_class(config), log_stats=True)
        self._scheduler: Any = self._core.scheduler
        self._world_size: int = config.parallel_config.world_size
        self._block_tokens: int = config.cache_config.block_size
        connectors = getattr(self._scheduler.connector, "sub_connectors", ())
        # `kv.offload.TieredConnector`, in an engine that has tiers.
        tiered = (each for each in connectors if isinstance(each, OffloadingConnector))
        self._tiered: Any = next(tiered, None)
        self._tiers: Any = None if self._tiered is None else self._tiered.scheduler.manager
        secondary = () if self._tiers is None else self._tiers.secondary_tiers
        self.vault = next((tier for tier in secondary if isinstance(tier, VaultTier)), None)
        self._peer = next((tier for tier in secondary if isinstance(tier, PeerTier)), None)
        self._erasure = Erasure(
            self._scheduler,
            self._publish,
            self._wipe,
            lease_s(config.kv_transfer_config),
            time.monotonic,
            self._tiers,
        )
        self._backlog = Backlog(self._scheduler)
        self._watch = Stopwatch(self._scheduler, self.kv_bytes_per_token(), time.monotonic)
        self._classes = Classes(self._scheduler, time.monotonic)
        self._first_to_go = FirstToGo(self._scheduler, step_pages(config))
        self._events = MirrorEvents(self._erasure)
        self._mirror = self._events.mirror
        if self._tiers is not None:
            self._mirror.hold(Tier.DISK, self._tiers.found())
        self._scheduler.kv_event_publisher = self._events
        # vLLM's own, in this process's registry (`workers.metrics`).
        self._vllm_metrics = PrometheusStatLogger(config)
        self._listener = listener
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._trusted_s = trusted_s(config.kv_transfer_config)
        behind = () if self._tiers is None else self._tiers.behind()
        self._behind: tuple[Tier, ...] = behind
        self._totals = Counters(behind, time.monotonic, retry_s, self._world_size)
        self._prompt_tokens: dict[str, int] = {}
        self.failure: BaseException | None = None
        self._stepped_at, self._idle = time.monotonic(), True
        self._computed_at, self._pause_s = self._stepped_at, 0.0
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    @property
    def core(self) -> EngineCore:
        """vLLM's engine; touched from outside only before `start` and in tests."""
        return self._core

    def start(self) -> None:
        """Begin to step; what was queued before is carried out first."""
        self._thread.start()

    def open_peers(self, host: str, keys: PeerKeys) -> str:
        """Lend blocks of the host tier to other replicas, at the address that is returned, and
        fetch theirs; empty without a peer tier. Before `start`."""
        return "" if self._peer is None else self._peer.open(host, keys, self._tiers.primary_tier)

    def geometry(self) -> Geometry:
        """What one rank's pages hold, as allocated."""
        return pages.geometry(self._scheduler.kv_cache_config)

    def room_tokens(self) -> int:
        """How much of one prompt the host tier takes in from the tiers behind it."""
        if self._tiers is None:
            return 0
        kinds = self._scheduler.kv_cache_config.kv_cache_groups
        return int(self._tiers.most_promoted // len(kinds) * self._block_tokens)

    def kv_bytes_per_token(self) -> int:
        """Bytes of paged KV that one token takes over all layers and ranks, as allocated."""
        return self._world_size * self.geometry().bytes_per_token()

    def add(
        self,
        request: EngineCoreRequest,
        answered: Sequence[int] = (),
        hints: Hints | None = None,
        keep: Keep | None = None,
        patience_s: float | None = None,
    ) -> None:
        """Queue a request. Hashing and grammar set-up happen here, off the step loop.

        `answered` tokens at the end of its prompt are of its answer already: a grammar goes on
        behind them. `hints` say what it may take from tiers; without any it takes what they have.
        `keep` says how they may store its blocks. For `patience_s` it gives way to others.
        """
        arrived_s = time.monotonic()
        prepared, _ = self._core.preprocess_add_request(request)
        if self._tiers is not None:
            tag, params = tag_of(prepared.cache_salt), prepared.kv_transfer_params
            prepared.kv_transfer_params = with_hints(params, tag, hints, keep)
        yields = keep is not None and keep.yields
        self._orders.put(lambda: self._admit(prepared, answered, arrived_s, patience_s, yields))

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests and free their blocks; unknown ids are ignored.

        They go to vLLM's own abort queue too, which is read between a step's compute and its
        bookkeeping, so that an abort does not wait for the following step.
        """
        self._core.aborts_queue.put_nowait(request_ids)
        self._orders.put(lambda: self._core.abort_requests(request_ids))

    def forget(self) -> None:
        """Drop every cached block, those in this replica's tiers too; the vault is everybody's."""
        self._orders.put(self._reset)

    def erase(self, tags: Sequence[str], receiver: Callable[[Erased], None]) -> None:
        """Erase the blocks of these tags and tell `receiver`, behind the change report; with a
        vault on a thread of its tier, once the vault has erased them too."""
        self._orders.put(lambda: self._erase(tags, receiver))

    def snapshot(self, receiver: Callable[[dict[Tier, bytes]], None]) -> None:
        """Give `receiver` every catalogue key held, by tier, in order with the change reports."""
        self._orders.put(lambda: self._give_snapshot(receiver))

    def stalled_s(self) -> float:
        """Seconds since the loop last came round while it has work; 0 when it has none."""
        # Not vLLM's own answer: that walks books of the tiers which the engine's thread changes.
        return 0.0 if self._idle else time.monotonic() - self._stepped_at

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop and free what the engine owns; safe to call twice."""
        if self._thread.is_alive():
            self._orders.put(None)
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step()
        except BaseException as error:  # the thread's edge: the replica reports it and restarts
            logger.exception("engine step loop ended")
            self.failure = error
        finally:
            self._core.shutdown()

    def _take_orders(self) -> bool:
        """Carry out what was asked; block while there is nothing to step."""
        while True:
            began_at, self._stepped_at = self._stepped_at, time.monotonic()
            if self._stepped_at - began_at > self._trusted_s:
                self._drop_doubtful()
            self._idle = not self._scheduler.has_requests() and not self._core.batch_queue
            try:
                order = self._orders.get(timeout=None if self._idle else self._pause_s)
            except queue.Empty:
                self._pause_s = 0.0
                return True
            self._pause_s = 0.0
            if self._idle:
                self._stepped_at, self._idle = time.monotonic(), False
                self._computed_at = self._stepped_at
            if order is None:
                return False
            order()

    def _step(self) -> None:
        self._erasure.sweep()
        if not self._scheduler.has_requests() and not self._core.batch_queue:
            return
        self._classes.begin_step()
        try:
            outputs, executed = self._core.step_fn()
        finally:
            self._classes.end_step()
        self._core.post_step(executed)
        self._first_to_go.settle()
        self._report(outputs or {})
        if not executed and self._scheduler.has_unfinished_requests():
            waited_s = time.monotonic() - self._computed_at
            self._pause_s = min(_MOST_PAUSE_S, max(_WAITING_PAUSE_S, _PAUSE_SHARE * waited_s))
            return
        self._computed_at = time.monotonic()
        if not executed and self._scheduler.has_requests():
            self._pause_s = _LEASED_PAUSE_S

    def _drop_doubtful(self) -> None:
        """End the requests whose KV was on its way while this loop stood still: no heartbeat of
        theirs went out, so the pages that were read may have been another prompt's by then."""
        requests = self._scheduler.requests.values()
        receiving = (r for r in requests if r.status in _RECEIVING)
        doubtful = [r.request_id for r in receiving if work.has_handoff(r)]
        if not doubtful:
            return
        logger.warning("%d requests ended: their KV may be stale", len(doubtful))
        self._core.abort_requests(doubtful)
        stale = "its KV may be stale: the engine stood still while it was read"
        refusals = [Delta(name, [], finish_reason="error", error=stale) for name in doubtful]
        self._listener(StepReport(refusals, (), self._load()))

    def _admit(
        self,
        request: Request,
        answered: Sequence[int],
        arrived_s: float,
        patience_s: float | None,
        yields: bool,
    ) -> None:
        try:
            if answered and not advance_grammar(request, answered):
                time.sleep(_WAITING_PAUSE_S)  # it compiles on a thread of vLLM's
                told = (request, answered, arrived_s, patience_s, yields)
                self._orders.put(lambda: self._admit(*told))
                return
            lossy = keep_of(request.kv_transfer_params).codec is not None
            self._watch.arrived(request.request_id, arrived_s, lossy)
            self._erasure.admit(request)
            self._classes.admit(request, patience_s)
            if patience_s is not None:
                self._totals.fetches.gives_way(request.request_id, self._scheduler.requests)
            self._first_to_go.admit(request, yields)
            self._core.add_request(request)
            self._backlog.admit(request)
        except Exception as error:  # the order's edge: a bad request must not end the loop
            refusal = Delta(request.request_id, [], finish_reason="error", error=str(error))
            self._listener(StepReport([refusal], (), self._load()))
            return
        self._report({})

    def _reset(self) -> None:
        # Refused while any block is held; the mirror must not forget what the cache has.
        if self._core.reset_prefix_cache(reset_connector=self._tiers is not None):
            self._mirror.clear()
        if self._tiers is not None:
            self._tiers.clear()
            self._publish()
        self._report({})

    def _erase(self, tags: Sequence[str], receiver: Callable[[Erased], None]) -> None:
        erased = self._erasure.erase(tags)
        words = "%d blocks erased, %d of them in use, and %d in tiers"
        logger.info(words, erased.blocks, erased.in_use, erased.in_tiers)
        self._publish()
        self._report({})
        if self._tiers is None:
            receiver(erased)
            return
        # Files are unlinked beside the steps.
        files: Future[None] = self._tiers.purge(tags)
        files.add_done_callback(
            lambda gone: self._orders.put(lambda: self._purged(gone, erased, receiver))
        )

    def _purged(
        self, files: Future[None], erased: Erased, receiver: Callable[[Erased], None]
    ) -> None:
        try:
            files.result()
        except DiskError as error:  # the order's edge: who gave it hears nothing and asks again
            logger.error("erasing is not done: %s", error)
            return
        if self.vault is None:
            receiver(erased)
        else:
            self.vault.forgotten(lambda: receiver(erased))

    def _publish(self) -> None:
        """Block events otherwise wait for the end of a step."""
        events = list(self._scheduler.kv_cache_manager.take_events() or ())
        if self._tiered is not None:
            events += self._tiered.take_events()
        if events:
            self._events.publish(EventBatch(ts=time.time(), events=events))

    def _wipe(self, pages: list[int]) -> None:
        total = self._scheduler.kv_cache_config.num_blocks
        self._core.collective_rpc(erasure.zero_pages, args=(pages, total))

    def _give_snapshot(self, receiver: Callable[[dict[Tier, bytes]], None]) -> None:
        # Pending changes go out first: they are part of the snapshot, not news after it.
        self._report({})
        receiver({tier: self._mirror.snapshot(tier) for tier in (Tier.DEVICE, *self._behind)})

    def _report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        deltas = [self._delta(output) for batch in outputs.values() for output in batch.outputs]
        for delta in deltas:
            if delta.handoff is not None:
                self._erasure.mark(delta.request_id, delta.handoff)
        for batch in outputs.values():
            self._totals.observe(batch.scheduler_stats)
            self._vllm_metrics.record(without_connectors(batch.scheduler_stats), None)
        for load in () if self.vault is None else self.vault.loads():
            self._totals.fetches.copied(Tier.VAULT, *load)
        for came in () if self._peer is None else self._peer.loads():
            self._totals.fetches.borrowed(*came)
        self._totals.count(deltas)
        changes = self._mirror.take()
        self._totals.evicted(changes)
        self._listener(StepReport(deltas, changes, self._load()))

    def _delta(self, output: EngineCoreOutput) -> Delta:
        delta = work.delta(output)
        if delta.sources is None:
            return delta
        by_tier = None if self._tiered is None else self._tiered.loaded
        loaded = None if by_tier is None else by_tier.pop(delta.request_id, None)
        sources = with_tiers(delta.sources, loaded)
        spent = self._watch.spent(delta.request_id, sources)
        if spent is not None:
            self._totals.fetches.waited(delta.request_id, sources, spent)
        return msgspec.structs.replace(delta, sources=sources, spent=spent)

    def _load(self) -> Load:
        scheduler = self._scheduler
        running, waiting = scheduler.get_request_counts()
        pending = self._backlog.tokens()
        return Load(
            waiting=waiting,
            running=running,
            pending_prefills=len(pending),
            pending_prefill_tokens=sum(pending.values()),
            leased=len(scheduler.requests) - running - waiting,
            kv_usage=scheduler.kv_cache_manager.usage,
            totals=self._totals.frozen(),
            tiers={tier: self._tier(tier) for tier in self._behind},
            yielding=self._classes.yielding(pending),
            peer=self._totals.fetches.peer(),
        )

    def _tier(self, tier: Tier) -> TierLoad:
        blocks, unnamed = self._mirror.blocks(tier), self._mirror.unnamed(tier)
        if tier is not Tier.VAULT or self.vault is None:
            return self._totals.fetches.load(tier, blocks, unnamed)
        # Others store and find there too: nobody here knows what it has.
        return self._totals.fetches.load(tier, blocks, 1, self.vault.lossy_share)
