"""Erasing a tenant's blocks from one engine's paged KV.

vLLM finds a block by its hash alone. Its events carry a request's session, which no part of 0.32
uses for anything else, so `workers.work` puts the tag of the request's salt there (`kv.salt`), and
every block of every KV cache group is remembered by it: about 200 bytes a block.

An erased block loses its name at once, whoever reads it. A request that reads such blocks goes on
unharmed but is concealed: what it adds to its chain is named after nothing and loses that name
with the step that stored it. The bytes are overwritten too, once nobody reads the page: of erased
blocks, and of every page that had no name when the order came, since tails of prompts and blocks
that were evicted earlier lie there.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kv.salt import UNTAGGED, tag_of
from workers.messages import FORGOTTEN

_CONCEALED = "concealed"


@dataclass(frozen=True, slots=True)
class Erased:
    """`blocks` lost their names; `in_use` of them are overwritten once their readers end. Tiers
    lost `in_tiers`, of the same blocks or of others."""

    blocks: int
    in_use: int
    in_tiers: int = 0


class Erasure:
    """Which blocks carry which tag, and what was asked to be erased. The engine's thread only.

    `scheduler` is vLLM's; `publish` hands its pending events to `stored` and `removed`; `wipe`
    overwrites pages. A finished prefill waits at most `handoff_s` to be read. `tiers` are those
    behind the paged KV (`kv.offload_tiers.Tiers`), or None.
    """

    def __init__(
        self,
        scheduler: Any,
        publish: Callable[[], None],
        wipe: Callable[[list[int]], None],
        handoff_s: float,
        now: Callable[[], float],
        tiers: Any = None,
    ) -> None:
        self._scheduler, self._publish, self._wipe = scheduler, publish, wipe
        self._pool: Any = scheduler.kv_cache_manager.block_pool
        self._handoff_s, self._now = handoff_s, now
        self._tiers = tiers
        self._tags: dict[bytes, str] = {}
        self._interned: dict[str, str] = {}
        self._recent: dict[str, float] = {}
        self._concealed: set[str] = set()
        self._unwiped: set[int] = set()

    def stored(self, names: Iterable[bytes], session: str | None) -> bool:
        """Blocks that can be found now, by vLLM's names with their group; False if they were
        of a concealed request and cannot be found any more."""
        if session == _CONCEALED:
            for name in names:
                self._unwiped.update(page.block_id for page in self._evict(name))
            return False
        tag = self._interned.setdefault(session or UNTAGGED, session or UNTAGGED)
        self._tags.update((name, tag) for name in names)
        return True

    def removed(self, names: Iterable[bytes]) -> None:
        """Blocks that lost a page; another page may still hold the same block."""
        for name in names:
            if self._pool.cached_block_hash_to_block.get_one_block(name) is None:
                self._tags.pop(name, None)

    def cleared(self) -> None:
        """The engine dropped its whole cache."""
        self._tags.clear()

    def admit(self, request: Any) -> None:
        """Conceal a request that brings KV from before an order: its prefill says so, or may
        have finished before the prefill replica had the order."""
        handoff = request.kv_transfer_params or {}
        until = self._recent.get(tag_of(request.cache_salt), 0.0)
        if handoff.get("do_remote_prefill") and (FORGOTTEN in handoff or self._now() < until):
            self._conceal(request)

    def mark(self, request_id: str, handoff: dict[str, Any]) -> None:
        """Say in a handoff that its KV is from before an order."""
        if request_id in self._concealed:
            handoff[FORGOTTEN] = True

    def erase(self, tags: Iterable[str]) -> Erased:
        """Take the names of all blocks with these tags, and overwrite what nobody reads."""
        tags, now = frozenset(tags), self._now()
        self._publish()  # what is stored and not yet told counts too
        self._recent = {tag: until for tag, until in self._recent.items() if until > now}
        # Twice, since the prefill replica may carry the order out later than this one.
        self._recent.update(dict.fromkeys(tags, now + 2 * self._handoff_s))
        for request in self._scheduler.requests.values():
            if tag_of(request.cache_salt) in tags:
                self._conceal(request)
        names = [name for name, tag in self._tags.items() if tag in tags]
        pages = [page for name in names for page in self._evict(name)]
        self._publish()
        unnamed = (page for page in self._pool.blocks if page.block_hash is None)
        self._unwiped.update(page.block_id for page in unnamed if not page.is_null)
        in_use = sum(page.ref_cnt > 0 for page in pages)
        self.sweep()
        in_tiers = 0 if self._tiers is None else self._tiers.erase(tags)
        return Erased(len(pages), in_use, in_tiers)

    def sweep(self) -> None:
        """Overwrite pages whose readers have ended. To be called between steps, before the next
        gives pages out."""
        if self._concealed:
            self._concealed &= self._scheduler.requests.keys()
        if not self._unwiped:
            return
        pages = [self._pool.blocks[page] for page in self._unwiped]
        # A page with a name is full: its present owner has overwritten all of it.
        pages = [page for page in pages if page.block_hash is None]
        free = [page.block_id for page in pages if page.ref_cnt == 0 and not self._lent(page)]
        if free:
            self._wipe(sorted(free))
        self._unwiped = {page.block_id for page in pages} - set(free)

    def _lent(self, page: Any) -> bool:
        """Whether a connector still reads this free page."""
        return page.block_id in self._pool._reuse_watchers

    def _conceal(self, request: Any) -> None:
        self._concealed.add(request.request_id)
        if self._tiers is not None:
            self._tiers.seal(request.request_id)
        request.session_id = _CONCEALED
        # Further names derive from these; the request itself holds its pages by number.
        request.block_hashes[:] = [secrets.token_bytes(len(h)) for h in request.block_hashes]

    def _evict(self, name: bytes) -> list[Any]:
        """Every page that is found by `name`, found no more."""
        evicted = []
        while page := self._pool.cached_block_hash_to_block.get_one_block(name):
            self._pool.evict_blocks({page.block_id})
            evicted.append(page)
        return evicted


def zero_pages(worker: Any, pages: list[int], total: int) -> None:
    """Overwrite `pages` of `total` in one of vLLM's workers; ascending page numbers.

    Layers whose state has no block dimension of its own (state-space models) are left as they
    are. On a GPU this is queued behind the steps that were given to it.
    """
    for layer in worker.model_runner.kv_caches:
        if layer.ndim < 4 or layer.shape[0] % total:
            continue
        rows = layer.shape[0] // total  # vLLM may split a page into rows for its kernel
        for first, end in _runs(pages):
            layer[first * rows : end * rows].zero_()


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs [first, end)."""
    breaks = [at + 1 for at, (a, b) in enumerate(pairwise(pages)) if b != a + 1]
    bounds = [0, *breaks, len(pages)]
    return [(pages[a], pages[b - 1] + 1) for a, b in pairwise(bounds) if a < b]
