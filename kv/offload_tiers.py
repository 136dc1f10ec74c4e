"""What an engine's tiers do with its blocks: vLLM's manager, made to end, to yield and to erase."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kv.catalogue import Tier
from kv.keep import Stored, yields
from kv.offload_disk import DiskTier, tag_of
from kv.offload_host import HostTier
from kv.offload_rows import overwrite
from kv.offload_split import SplitLookups
from kv.promoted import DEADLINE, Promoted, state_of

logger = init_logger(__name__)

# What vLLM calls the tiers behind the host tier.
_NAMES = {
    (Medium.STORAGE, Locality.LOCAL): Tier.DISK,
    (Medium.STORAGE, Locality.REMOTE): Tier.VAULT,
}
# How long a request waits where neither its plan nor the configuration says (`load_timeout_s`).
LOAD_TIMEOUT_S = 5.0
# One complaint about late loads in so many seconds.
_COMPLAIN_EVERY_S = 60.0


@runtime_checkable
class Piecewise(Protocol):
    """A tier that tells of the blocks of a load before the last of them is there."""

    def arrived(self) -> Iterable[tuple[int, OffloadKey]]:
        """Blocks that have come whole since the last call, each with its job."""
        ...


@runtime_checkable
class Erasing(Protocol):
    """A tier that can erase tenants."""

    def erase(self, tags: Collection[str]) -> int:
        """Remove every block with one of these tags, and store none that waits to be; how many
        are gone now."""
        ...


class Tiers(SplitLookups):
    """vLLM's manager, with an end to its retries and with erasure. The engine's thread only.

    Stock, a prefix longer than the host tier is fetched for ever: each block fetched displaces
    one that the request still needs. Here a request has a block fetched once, and half of the
    host tier at most; what does not fit is a miss. So is what has not come `load_timeout_s` after
    the request began to wait, or after its own `DEADLINE`.

    A request that yields (`kv.keep`) has blocks stored and fetched only where nothing that stays
    has to go for them, and stores none behind the host tier.
    """

    def __init__(
        self,
        primary: HostTier,
        tiers: list[SecondaryTierManager],
        load_timeout_s: float = LOAD_TIMEOUT_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(primary, tiers)
        self._load_timeout_s, self._now = load_timeout_s, now
        self._complained_at = -math.inf
        primary.withheld = lambda key: key in self._doomed
        self.most_promoted = max(1, primary._num_chunks // 2)
        self._tags: dict[OffloadKey, str] = {}
        self._doomed: set[OffloadKey] = set()
        self._sealed: set[str] = set()
        self._arrived: dict[int, set[OffloadKey]] = {}  # by job that has not ended
        self._cascades = True

    def lookup(
        self, key: OffloadKey, req_context: ReqContext, *, exclude_tier_idx: int | None = None
    ) -> LookupResult:
        if key in self._doomed:
            return LookupResult.MISS
        found = self._between_looks(key, req_context)
        if found is not None:
            return found
        found = super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)
        if found is LookupResult.HIT and not yields(req_context.kv_transfer_params):
            self.primary_tier.claim([key])
        waits = found is LookupResult.HIT_PENDING or found is LookupResult.RETRY
        return LookupResult.MISS if waits and self._is_late(req_context) else found

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        state_of(req_context, Promoted).waits_since_s = None  # preempted, it may have to wait again
        return super().prepare_load(keys, req_context)

    def _is_late(self, req_context: ReqContext) -> bool:
        """Whether a request has waited for tiers as long as it may; the rest is computed then."""
        promoted, now = state_of(req_context, Promoted), self._now()
        deadline_s = (req_context.kv_transfer_params or {}).get(DEADLINE, self._load_timeout_s)
        was_late = promoted.late
        late = promoted.overran(deadline_s, now)
        if late and not was_late and now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            logger.warning("tiers: a load took over %g s; its tokens are computed", deadline_s)
        return late

    def _initiate_promotion(self, tier_idx: int, key: OffloadKey, req_context: ReqContext) -> bool:
        promoted = state_of(req_context, Promoted)
        if promoted.late or key in promoted.keys or len(promoted.keys) >= self.most_promoted:
            return False
        if yields(req_context.kv_transfer_params) and not self.primary_tier.room():
            return False
        started: bool = super()._initiate_promotion(tier_idx, key, req_context)
        if started:
            promoted.keys.add(key)
            self._tag([key], req_context)
        return started

    def _process_finished_jobs(self) -> None:
        """What of a load is there already can be used, should its request wait no longer for the
        rest."""
        for tier in self.secondary_tiers:
            for job_id, key in tier.arrived() if isinstance(tier, Piecewise) else ():
                job = self._jobs.get(job_id)
                if job is not None:  # it may have ended since
                    self.primary_tier.complete_write([key], job.transfer_job.req_context, True)
                    self._arrived.setdefault(job_id, set()).add(key)
        super()._process_finished_jobs()

    def _complete_promotion(self, job_metadata: Any, completed_job: JobResult) -> None:
        here = self._arrived.pop(completed_job.job_id, None)
        if here:
            job = job_metadata.transfer_job
            job.keys = [key for key in job.keys if key not in here]
            came = completed_job.successful_keys
            completed_job.successful_keys = came and [key for key in came if key not in here]
        super()._complete_promotion(job_metadata, completed_job)

    def _should_store_to_tier(self, tier: SecondaryTierManager, num_blocks: int) -> bool:
        stores: bool = self._cascades and getattr(tier, "stores", True)
        return stores and super()._should_store_to_tier(tier, num_blocks)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        if yields(req_context.kv_transfer_params):
            self._maybe_process_finished_jobs()  # stores that ended since have made room
            keys = self.primary_tier.fitting(keys, state_of(req_context, Stored))
        else:
            self.primary_tier.claim(keys)
        if req_context.req_id in self._sealed or not keys:
            return PrepareStoreOutput([], CPULoadStoreSpec([]), [])
        output = super().prepare_store(keys, req_context)
        if output is not None:
            self._tag(output.keys_to_store, req_context)
        return output

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        # What was erased while it was copied gets no further than to where it is removed.
        doomed = self._doomed.intersection(keys)
        self.primary_tier.complete_store(doomed, req_context, success)
        kept = [key for key in keys if key not in doomed]
        self._cascades = not yields(req_context.kv_transfer_params)
        super().complete_store(kept, req_context, success)
        self._cascades = True

    def on_request_finished(
        self, req_context: ReqContext, *, exclude_tier_idx: int | None = None
    ) -> None:
        self._sealed.discard(req_context.req_id)
        super().on_request_finished(req_context, exclude_tier_idx=exclude_tier_idx)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self._doomed = {key for key in self._doomed if not self._remove(key)}

    def has_pending_work(self) -> bool:
        return bool(self._doomed) or super().has_pending_work()

    def reset_cache(self) -> None:
        super().reset_cache()
        if self.primary_tier.events is not None:
            gone = OffloadingEvent(list(self._tags), Medium.CPU, removed=True)
            self.primary_tier.events.append(gone)
        self._tags.clear()
        self._doomed.clear()

    def behind(self) -> tuple[Tier, ...]:
        """The tiers that have blocks of their own, in the order in which they are asked. A peer's
        are told by the peer."""
        names = ((tier.medium, tier.locality) for tier in self.secondary_tiers)
        return (Tier.HOST, *(_NAMES[name] for name in names if name in _NAMES))

    def found(self) -> list[bytes]:
        """Engine names of the first group's blocks that are on disk: at a start, what was found."""
        disks = [tier for tier in self.secondary_tiers if isinstance(tier, DiskTier)]
        keys = (OffloadKey(key) for disk in disks for key in disk.store.held())
        return [get_offload_block_hash(key) for key in keys if not get_offload_group_idx(key)]

    def seal(self, request_id: str) -> None:
        """Store no more of this request: its tenant was erased while it ran."""
        self._sealed.add(request_id)

    def erase(self, tags: Collection[str]) -> int:
        """Remove every block with one of these tags, overwriting it in host memory; returns how
        many. Blocks that are being copied go once they have been, and are a miss until then; files
        are `purge`'s."""
        # A request that has ended is stored with the next step, which comes after this.
        for request_id, state in self._req_state.items():
            if not state.is_finished and tag_of(state.req_context) in tags:
                self.seal(request_id)
        keys = [key for key, tag in self._tags.items() if tag in tags]
        held = [key for key in keys if self.primary_tier._policy.get(key) is not None]
        self._doomed.update(key for key in held if not self._remove(key))
        erasing = (tier for tier in self.secondary_tiers if isinstance(tier, Erasing))
        return len(held) + sum(tier.erase(tags) for tier in erasing)

    def purge(self, tags: Collection[str]) -> Future[None]:
        """Unlink the files of tags that were erased; the result comes when they are gone, or is
        `DiskError` if some are left."""
        for disk in self._disks():  # one at most
            return disk.purge(tags)
        gone: Future[None] = Future()
        gone.set_result(None)
        return gone

    def clear(self) -> None:
        """Remove every block of this replica; `reset_cache` keeps what is on disk."""
        for disk in self._disks():
            disk.clear()

    def _disks(self) -> Iterator[DiskTier]:
        return (tier for tier in self.secondary_tiers if isinstance(tier, DiskTier))

    def _tag(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        tag = tag_of(req_context)
        self._tags.update((key, tag) for key in keys)
        if len(self._tags) > 2 * self.primary_tier._num_chunks + 64:
            policy = self.primary_tier._policy
            self._tags = {k: t for k, t in self._tags.items() if policy.get(k) is not None}

    def _remove(self, key: OffloadKey) -> bool:
        """Take a block out of the host tier and overwrite it; False while it is in use."""
        with self.primary_tier.lock:
            return self._removed(key)

    def _removed(self, key: OffloadKey) -> bool:
        primary = self.primary_tier
        chunk = primary._policy.get(key)
        if chunk is not None and chunk.ref_cnt != 0:
            return False
        if chunk is not None:
            primary._policy.remove(key)
            primary._num_evictable_cache_chunks -= 1
            primary._free_chunk(chunk)
            overwrite(primary, [chunk.chunk_id])
            if primary.events is not None:
                primary.events.append(OffloadingEvent([key], Medium.CPU, removed=True))
        self._tags.pop(key, None)
        return True
