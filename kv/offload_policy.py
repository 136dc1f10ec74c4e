"""Which block of the host tier goes first: those of requests that yield, then the oldest.

A block is a yielding one while only yielding requests have used it. Each kind is kept by a policy
of vLLM's own, least recently used first.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

from kv.keep import yields

Evicted = list[tuple[OffloadKey, ChunkStatus]]
# By which vLLM's factory knows it.
NAME = "yielding_first"


class YieldingFirst(CachePolicy):
    """vLLM's `CachePolicy` of the host tier. A yielding request makes nothing stay longer that
    others keep; any other makes what it uses stay."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._staying = LRUCachePolicy(cache_capacity)
        self._yielding = LRUCachePolicy(cache_capacity)
        # Of the yielding ones those that nobody reads or writes.
        self._idle: set[OffloadKey] = set()
        # Blocks of yielding requests that are about to be inserted.
        self._coming: set[OffloadKey] = set()

    @property
    def chunks(self) -> dict[OffloadKey, ChunkStatus]:
        """Every block that is held, by its key."""
        return {**self._staying.chunks, **self._yielding.chunks}

    def idle_yielding(self, spared: Collection[OffloadKey] = ()) -> int:
        """How many blocks would go before any that stays; without the `spared` ones."""
        return len(self._idle) - len(self._idle.intersection(spared))

    def claim(self, keys: Iterable[OffloadKey]) -> None:
        """A request that does not yield uses these blocks: they stay as any does from now on."""
        for key in keys:
            chunk = self._yielding.get(key)
            if chunk is not None:
                self._idle.discard(key)
                self._yielding.remove(key)
                self._staying.insert(key, chunk)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        chunk = self._staying.get(key)
        return self._yielding.get(key) if chunk is None else chunk

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        if key not in self._coming:
            self._staying.insert(key, chunk)
            return
        self._coming.discard(key)
        self._yielding.insert(key, chunk)
        if chunk.ref_cnt == 0:
            self._idle.add(key)

    def remove(self, key: OffloadKey) -> None:
        self._idle.discard(key)
        self._of(key).remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        if yields(req_context.kv_transfer_params):
            self._yielding.touch(keys, req_context)
        else:
            keys = list(keys)
            self.claim(keys)
            self._staying.touch(keys, req_context)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        if yields(req_context.kv_transfer_params):
            self._coming.update(keys)
        else:
            self._coming.difference_update(keys)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        used = (key_groups, insertion_only_keys, reused_keys, req_context)
        self._coming.difference_update(key for group in key_groups for key in group)
        if yields(req_context.kv_transfer_params):
            self._yielding.on_request_finished(*used)
            return
        for group in key_groups:
            self.claim(group)
        self._staying.on_request_finished(*used)

    def evict(self, n: int, protected: set[OffloadKey]) -> Evicted | None:
        first = min(n, self.idle_yielding(protected))
        # Those that stay come first here, since that is what may fail.
        rest = self._staying.evict(n - first, protected)
        if rest is None:
            return None
        gone = self._yielding.evict(first, protected)
        assert gone is not None, f"{first} blocks counted as idle, fewer found"
        self._idle.difference_update(key for key, _ in gone)
        return [*gone, *rest]

    def clear(self) -> None:
        self._staying.clear()
        self._yielding.clear()
        self._idle.clear()
        self._coming.clear()

    def mark_evictable(self, key: OffloadKey) -> None:
        policy = self._of(key)
        policy.mark_evictable(key)
        if policy is self._yielding:
            self._idle.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        self._idle.discard(key)
        self._of(key).mark_non_evictable(key)

    def _of(self, key: OffloadKey) -> LRUCachePolicy:
        return self._staying if self._staying.get(key) is not None else self._yielding


with suppress(ValueError):  # a module that is loaded anew finds it there
    CachePolicyFactory.register_cache_policy(NAME, __name__, YieldingFirst.__name__)
