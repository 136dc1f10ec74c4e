"""The host tier as vLLM keeps it, of which another thread may lend blocks to other replicas.

vLLM's books are for the engine's thread alone. Here each change of them takes a lock, so that a
block can be pinned between two of the engine's calls instead of between two of its steps: a step
that computes a prompt takes as long as a fetch is worth.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from typing import Any

from vllm.v1.kv_offload.base import OffloadKey
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from kv.keep import Stored
from kv.loan import Loan
from kv.offload_policy import NAME as YIELDING_FIRST
from kv.offload_policy import YieldingFirst


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def locked(self: "HostTier", *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class HostTier(CPUPrimaryTierOffloadingManager):
    """vLLM's host tier, and loans of its blocks from any thread.

    At most half of the tier is lent at a time. `withheld` says which blocks are not lent though
    they are there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lock = threading.RLock()
        self.withheld: Callable[[OffloadKey], bool] = lambda _: False
        self._lent = 0
        self._held: set[int] = set()
        self._freed: set[int] = set()
        super().__init__(*args, **{**kwargs, "cache_policy": YIELDING_FIRST})

    touch = _locked(CPUPrimaryTierOffloadingManager.touch)
    _prepare_load = _locked(CPUPrimaryTierOffloadingManager._prepare_load)
    complete_load = _locked(CPUPrimaryTierOffloadingManager.complete_load)
    prepare_store = _locked(CPUPrimaryTierOffloadingManager.prepare_store)
    complete_store = _locked(CPUPrimaryTierOffloadingManager.complete_store)
    on_request_finished = _locked(CPUPrimaryTierOffloadingManager.on_request_finished)
    reset_cache = _locked(CPUPrimaryTierOffloadingManager.reset_cache)

    @property
    def lent(self) -> int:
        """Blocks that are lent now, counted once for each loan."""
        return self._lent

    def room(self, spared: Collection[OffloadKey] = ()) -> int:
        """How many blocks may come before one that stays has to go; `spared` ones do not go."""
        with self.lock:
            policy: YieldingFirst = self._policy
            return int(self._get_num_free_chunks()) + policy.idle_yielding(spared)

    def fitting(self, keys: Collection[OffloadKey], stored: Stored) -> Collection[OffloadKey]:
        """Those blocks of a yielding request for which none that stays has to go."""
        with self.lock:
            new = [key for key in keys if self._policy.get(key) is None]
            n = 0 if stored.cut else self.room(keys)
        stored.cut = stored.cut or n < len(new)
        return new[:n] if stored.cut else keys

    def claim(self, keys: Iterable[OffloadKey]) -> None:
        """A request that does not yield uses these blocks."""
        with self.lock:
            self._policy.claim(keys)

    def here(self, keys: Sequence[bytes]) -> tuple[bool, ...]:
        """Which of these blocks could be lent."""
        with self.lock:
            return tuple(self._lendable(OffloadKey(key)) is not None for key in keys)

    def lend(self, keys: Sequence[bytes]) -> Loan:
        """Pin these blocks, those that are here, until `give_back`."""
        rows: list[int | None] = []
        chunks: list[tuple[bytes, Any]] = []
        with self.lock:
            for key in map(OffloadKey, keys):
                chunk = self._lendable(key)
                full = self._lent >= self._num_chunks // 2
                if chunk is None or full:
                    rows.append(None)
                    continue
                if chunk.ref_cnt == 0:
                    self._policy.mark_non_evictable(key)
                    self._num_evictable_cache_chunks -= 1
                chunk.ref_cnt += 1
                self._lent += 1
                rows.append(chunk.chunk_id)
                chunks.append((key, chunk))
        return Loan(tuple(rows), tuple(chunks))

    def give_back(self, loan: Loan) -> None:
        """End a loan; once for each."""
        with self.lock:
            self._lent -= len(loan.chunks)
            for key, chunk in loan.chunks:
                # A reset drops what is lent: the key may name another chunk by now, or none.
                if self._policy.get(key) is chunk:
                    self.complete_load([key], None)

    def hold_back(self, rows: Collection[int]) -> None:
        """Give these rows to no block once they are free: bytes may still come into them."""
        with self.lock:
            self._held.update(rows)

    def let_go(self, rows: Collection[int]) -> None:
        """Nothing comes into these rows any more."""
        with self.lock:
            self._held.difference_update(rows)
            free = self._freed.intersection(rows)
            self._freed -= free
            self._free_list.extend(free)

    def _free_chunk(self, chunk: Any) -> None:
        if chunk.chunk_id in self._held:
            self._freed.add(chunk.chunk_id)
        else:
            super()._free_chunk(chunk)

    def _lendable(self, key: OffloadKey) -> Any:
        chunk = self._policy.get(key)
        ready = chunk is not None and chunk.is_ready
        return chunk if ready and not self.withheld(key) else None
