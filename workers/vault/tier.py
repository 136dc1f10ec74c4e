"""A vault as vLLM's offloading framework sees it: a tier behind the host tier, of all replicas.

Nothing here waits for the network on the engine's thread. A lookup asks for all blocks of its
request at once and says "later" until the answer is there or its time is over: then it is a miss.
Loads and stores run on threads and end by deadlines, so that the pages which they use come free. A
vault that is dead or slow costs hits, and a line a minute.
"""

import logging
import queue
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kv.codecs.codec import CodecName
from kv.codecs.page import PageShape
from kv.codecs.table import CODECS
from kv.curve import PrefillCurve
from kv.eviction import recompute_s
from kv.offload_disk import layout_of, tag_of
from kv.promoted import DEADLINE
from kv.vault.chains import Chains, Spot
from kv.vault.known import Known
from workers import curve
from workers.messages import Keep
from workers.tiers import VAULT_STORED_BYTES, keep_of, shard_names
from workers.vault.pages import Page, VaultPages

logger = logging.getLogger(__name__)

# A request waits no longer to hear which of its blocks are there; an answer takes about 1 ms.
ASK_S = 0.25
# Nor for the end of a store: this, and what a slow network needs for the bytes. Nor for blocks,
# unless its plan knows of a network that is slower still.
LOAD_S, STORE_S = 2.0, 5.0
_SLOW_BYTES_PER_S = 100e6
# On all shards together; an ingress waits 30 s for an order to erase.
_FORGET_S = 20.0
# Pages that may wait to be stored keep the host tier from its work.
_STORING_SHARE = 4
_COMPLAIN_EVERY_S = 60.0
_LOADERS = 4


@dataclass(slots=True)
class _Question:
    """What was asked for one request; `held` is None until that is known. `first` is the block
    that was looked up first in a `step`, `asked` the keys whose answer is not noted yet."""

    end_s: float
    held: frozenset[bytes] | None = None
    step: int = -1
    first: bytes = b""
    asked: tuple[bytes, ...] = ()


class VaultTier(SecondaryTierManager):
    """See the module. Holds nothing until `attach` says who it is and `seat` where shards are.

    A block is loadable only once the frame that brought it has proved whole, under the name that
    was asked for. One that does not come is not asked for again by its request
    (`kv.offload_tiers`).
    """

    # For the plan's hints; vLLM would take its blocks for a disk's.
    medium: ClassVar[Medium] = Medium.STORAGE
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(
        self,
        offloading_spec: TieringOffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        identity: str,
        shards: int,
        ttl_s: float | None,
        backpressure_detector: Any = None,
    ) -> None:
        """`identity` says all of the model and its options that the spec does not know."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        self._layout = bytes.fromhex(layout_of(offloading_spec, identity))
        groups = offloading_spec.config.groups
        self._block_tokens = {group.group_id: group.tokens_per_block for group in groups}
        self._shards, self._ttl_s = shard_names(shards), ttl_s
        self._most_storing = max(1, len(primary_kv_view) // _STORING_SHARE)
        self._vault: VaultPages | None = None
        self._asks = ThreadPoolExecutor(1, thread_name_prefix="vault-ask")
        self._loads = ThreadPoolExecutor(min(shards, _LOADERS), thread_name_prefix="vault-load")
        # One: what is forgotten comes behind what was being stored.
        self._stores = ThreadPoolExecutor(1, thread_name_prefix="vault-store")
        self._jobs: dict[int, TransferJob] = {}
        self._running: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._came: queue.SimpleQueue[tuple[int, OffloadKey]] = queue.SimpleQueue()
        self._storing: dict[int, int] = {}  # pages by job
        self._void: set[int] = set()  # jobs that are to store nothing more
        self._forgetting: Future[bool] | None = None
        self._sent_bytes, self._step = 0, 0
        self._known = Known()
        self._loaded: list[tuple[bool, int, float]] = []
        # What a lossy codec leaves of a page; None where all are stored as they are.
        self.lossy_share: float | None = None
        self._complained_s: dict[str, float] = {}

    def attach(
        self,
        keys: curve.ClientKeys,
        speed: PrefillCurve,
        shape: PageShape | None = None,
        lossy: CodecName | None = None,
    ) -> None:
        """Use the vault that these keys open; `speed` is this engine's, `shape` that of its pages
        where blocks may be stored by the codec `lossy`."""
        page_bytes = self._block_size_bytes
        if shape is not None and lossy is not None:
            self.lossy_share = CODECS[lossy].encoded_bytes(shape) / shape.page_bytes
        self._speed = speed
        self._vault = VaultPages(self._shards, keys, self._layout, page_bytes, self._ttl_s, shape)

    def seat(self, addresses: Mapping[str, str]) -> None:
        """Where shards are reached now, by name; from any one thread."""
        if self._vault is not None:
            self._vault.seat({n: at for n, at in addresses.items() if n in self._shards})

    def await_up(self, timeout_s: float) -> bool:
        """Whether all shards are connected, within this time."""
        return self._vault is not None and self._vault.await_up(timeout_s)

    # ------------------------------------------------------------------ what is there

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        question = req_context.get_state(_Question) or self._ask(req_context)
        if question.held is None:
            if time.monotonic() < question.end_s:
                return self._later(question, key)
            question.held = frozenset()
            self._complain("asked for in vain: no answer in time", len(self._chains(req_context)))
        elif question.asked:
            gone = [OffloadKey(each) for each in question.asked if each not in question.held]
            self._known.drop(gone)
            self._known.add(map(OffloadKey, question.held), tag_of(req_context))
            question.asked = ()
        return LookupResult.HIT if key in question.held else LookupResult.MISS

    def _later(self, question: _Question, key: OffloadKey) -> LookupResult:
        """vLLM looks the whole prompt up again in each step while one block says "later": 13 ms
        for 4,096 blocks. A miss behind it ends that, and does not count, as the request waits. Not
        where groups are looked up in turn, each by itself."""
        if question.step != self._step:
            question.step, question.first = self._step, key
        alone = len(self._block_tokens) == 1
        return LookupResult.MISS if alone and key != question.first else LookupResult.RETRY

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._step += 1

    def _ask(self, req_context: ReqContext) -> _Question:
        question = _Question(time.monotonic() + ASK_S)
        req_context.set_state(question)
        vault = self._vault
        if vault is None:
            question.held = frozenset()
        else:
            runs = self._chains(req_context).runs()
            question.asked = tuple(key for keys in runs.values() for key in keys)
            self._asks.submit(_answer, question, vault, runs)
        return question

    def _chains(self, req_context: ReqContext) -> Chains:
        chains: Chains | None = req_context.get_state(Chains)
        if chains is None:
            chains = Chains(self._block_tokens)
            req_context.set_state(chains)
        chains.extend(req_context._offload_key_positions)
        return chains

    # ------------------------------------------------------------------ loads and stores

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._loads, job_metadata, self._load)

    def submit_store(self, job_metadata: TransferJob) -> None:
        blocks, waiting = len(job_metadata.keys), sum(self._storing.values())
        full = waiting > 0 and waiting + blocks > self._most_storing
        if self._vault is not None and not full:
            self._storing[job_metadata.job_id] = blocks
            self._submit(self._stores, job_metadata, self._store)
            return
        self._jobs[job_metadata.job_id] = job_metadata
        self._finished.put(JobResult(job_metadata.job_id, success=False))
        if full:
            self._complain("not stored: the vault is slower than what is computed", blocks)

    def arrived(self) -> Iterable[tuple[int, OffloadKey]]:
        """Blocks of loads that go on (`kv.offload_tiers.Piecewise`)."""
        while not self._came.empty():
            yield self._came.get()

    def loads(self) -> Iterable[tuple[bool, int, float]]:
        """Of each load that ended since the last call: whether a lossy codec may have stored its
        blocks, bytes of pages that were asked for, and the seconds that these take at least."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        while not self._finished.empty():
            results.append(result := self._finished.get())
            job = self._jobs.pop(result.job_id)
            self._void.discard(result.job_id)
            self._storing.pop(result.job_id, None)
            if job.is_promotion:
                lossy = _keep(job.req_context).codec is not None
                # Where less came, all of it takes longer still.
                asked_bytes = len(job.keys) * self._block_size_bytes
                self._loaded.append((lossy, asked_bytes, result.transfer_time or 0.0))
            else:
                self._sent_bytes += result.transfer_bytes or 0
                self._known.add(result.successful_keys or (), tag_of(job.req_context))
        self._running = {each for each in self._running if not each.done()}
        return results

    def take_events(self) -> Iterable[OffloadingEvent]:
        stored, removed = self._known.take()
        told = ((stored, False), (removed, True))
        return [
            OffloadingEvent(keys, self.medium, gone, self.locality) for keys, gone in told if keys
        ]

    def get_stats(self) -> OffloadingConnectorStats | None:
        if not self._sent_bytes:
            return None
        stats = OffloadingConnectorStats()
        stats.increase_counter(VAULT_STORED_BYTES, self._sent_bytes)
        self._sent_bytes = 0
        return stats

    def drain_jobs(self) -> None:
        wait(self._running)

    def shutdown(self) -> None:
        for pool in (self._asks, self._loads, self._stores):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._vault is not None:
            self._vault.close()
            self._vault = None

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        job: TransferJob,
        act: Callable[[TransferJob, dict[OffloadKey, Spot]], JobResult],
    ) -> None:
        self._jobs[job.job_id] = job
        chains, end_of = self._chains(job.req_context), job.req_context.get_offload_key_position
        spots = {key: chains.spot(key, end) for key in job.keys if (end := end_of(key))}
        self._running.add(pool.submit(self._carry_out, act, job, spots))

    # ------------------------------------------------------------------ erasing

    def erase(self, tags: Collection[str]) -> int:
        """Have the vault forget these tenants, and store nothing that waits to be. Returns 0: what
        the shards lost is known once `forgotten` tells."""
        for job_id, job in self._jobs.items():
            if not job.is_promotion and tag_of(job.req_context) in tags:
                self._void.add(job_id)
        self._known.forget(tags)
        self._forgetting = self._stores.submit(self._forget, frozenset(tags))
        return 0

    def forgotten(self, receiver: Callable[[], None]) -> None:
        """Call `receiver` on a thread of ours once every shard has carried out the last `erase`;
        never, if one did not."""

        def tell(done: Future[bool]) -> None:
            if not done.cancelled() and done.result():
                receiver()

        if self._forgetting is not None:
            self._forgetting.add_done_callback(tell)

    # ------------------------------------------------------------------ the pools' threads

    def _carry_out(
        self,
        act: Callable[[TransferJob, dict[OffloadKey, Spot]], JobResult],
        job: TransferJob,
        spots: dict[OffloadKey, Spot],
    ) -> None:
        began_s = time.monotonic()
        result = JobResult(job.job_id, success=False)
        try:
            result = act(job, spots)
        except Exception:  # the thread's edge: the engine waits for every job's end
            logger.exception("a job of the vault tier failed")
        finally:
            if result.transfer_time is None:
                result.transfer_time = time.monotonic() - began_s
            self._finished.put(result)

    def _store(self, job: TransferJob, spots: dict[OffloadKey, Spot]) -> JobResult:
        vault = self._vault
        if vault is None or job.job_id in self._void:
            return JobResult(job.job_id, success=False)
        tag = tag_of(job.req_context)
        patience_s = self._patience_s(STORE_S, job)
        stored = vault.store(
            tag, self._pages(job, spots), self._saves_s, patience_s, _keep(job.req_context)
        )
        if stored.lost:
            self._complain("not stored: no answer in time", stored.lost)
        held = [OffloadKey(key) for key in stored.held]
        return JobResult(job.job_id, stored.lost == 0, held, transfer_bytes=stored.sent_bytes)

    def _load(self, job: TransferJob, spots: dict[OffloadKey, Spot]) -> JobResult:
        vault = self._vault
        if vault is None:
            return JobResult(job.job_id, success=False)
        patience_s, keep = self._load_patience_s(job), _keep(job.req_context)

        begun_s: list[float] = []

        def tell(key: bytes) -> None:
            self._came.put((job.job_id, OffloadKey(key)))

        def begun() -> None:
            begun_s.append(time.monotonic())

        came = vault.load(self._pages(job, spots), patience_s, keep, tell, begun)
        keys = [OffloadKey(key) for key in came]
        if len(keys) < len(job.keys):
            self._complain("computed instead: they did not come, or damaged", len(job.keys))
        return JobResult(
            job.job_id,
            success=len(keys) == len(job.keys),
            successful_keys=keys,
            transfer_bytes=len(keys) * self._block_size_bytes,
            # Loads of one shard take turns: waiting for its own is none of the link's time.
            transfer_time=time.monotonic() - begun_s[0] if begun_s else 0.0,
        )

    def _forget(self, tags: frozenset[str]) -> bool:
        complaints = {} if self._vault is None else self._vault.forget(tags, _FORGET_S)
        for name, complaint in complaints.items():
            logger.error("%s has not forgotten %d tenants: %s", name, len(tags), complaint)
        return not complaints

    def _pages(self, job: TransferJob, spots: dict[OffloadKey, Spot]) -> list[Page]:
        view, rows = self._primary_kv_view, job.chunk_ids.tolist()
        return [
            Page(key, spots[key], view[row : row + 1].cast("B"))
            for key, row in zip(job.keys, rows, strict=True)
            if key in spots
        ]

    def _saves_s(self, spot: Spot) -> float:
        tokens = spot.end_token - spot.start_token
        # Blocks of all groups together save these tokens.
        return recompute_s(self._speed, spot.start_token, tokens) / len(self._block_tokens)

    def _load_patience_s(self, job: TransferJob) -> float:
        """Not shorter than its request waits, which ends first otherwise (`kv.offload_tiers`)."""
        planned_s: float = (job.req_context.kv_transfer_params or {}).get(DEADLINE, 0.0)
        return max(self._patience_s(LOAD_S, job), planned_s)

    def _patience_s(self, least_s: float, job: TransferJob) -> float:
        n_bytes: int = len(job.keys) * self._block_size_bytes
        return least_s + n_bytes / _SLOW_BYTES_PER_S

    def _complain(self, what: str, blocks: int) -> None:
        now = time.monotonic()
        if now - self._complained_s.get(what, -_COMPLAIN_EVERY_S) >= _COMPLAIN_EVERY_S:
            self._complained_s[what] = now
            logger.warning("vault tier: %d blocks %s", blocks, what)


def _keep(req_context: ReqContext) -> Keep:
    return keep_of(req_context.kv_transfer_params)


def _answer(question: _Question, vault: VaultPages, runs: Mapping[bytes, list[bytes]]) -> None:
    left_s = question.end_s - time.monotonic()
    # Nobody waits for it any more otherwise.
    if left_s > 0.0:
        question.held = vault.held(runs, left_s)
