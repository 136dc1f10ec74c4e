"""What `forget` does to the bytes of an engine's pages, and to vLLM's block pool."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from tests.flow.erasing_engine import PROMPT, run
from workers.erasure import Erasure, zero_pages

BLOCK_TOKENS = 32


def test_an_erased_tenant_leaves_no_byte_behind(tiny_model: Path) -> None:
    """On an idle engine the tenant's pages are zeros at once, the unnamed tail of its prompt
    too, and the other tenant's full blocks stay. Pages of a running stream are left to it, then
    overwritten; its tokens do not change."""
    found = run(tiny_model)
    full = len(PROMPT) // BLOCK_TOKENS
    assert len(found["before"]) == 2 * full + 1  # vLLM gives an unnamed page out again first
    assert found["idle"] == [full, 0]
    assert len(found["after"]) == full
    blocks, in_use = found["running"]
    assert blocks == in_use >= full
    assert len(found["during"]) >= full + in_use
    assert found["same_tokens"]
    # The other tenant's, and the tail of the request that came last.
    assert set(found["after"]) <= set(found["ended"])
    assert len(found["ended"]) <= full + 1


class _Pool:
    """vLLM's own block pool, with blocks stored as its scheduler stores them."""

    def __init__(self) -> None:
        self.pool = BlockPool(
            16, enable_caching=True, hash_block_size=4, enable_kv_cache_events=True
        )
        self.wiped: list[int] = []
        self.requests: dict[str, Any] = {}
        manager = SimpleNamespace(block_pool=self.pool)
        scheduler = SimpleNamespace(kv_cache_manager=manager, requests=self.requests)
        self.erasure = Erasure(
            scheduler, self.pool.take_events, self.wiped.extend, 30.0, lambda: 0.0
        )

    def store(self, block_hash: bytes, group: int, tag: str) -> int:
        """A page of one block, held by nobody; its number."""
        [page] = self.pool.get_new_blocks(1)
        name = make_block_hash_with_group_id(block_hash, group)  # type: ignore[arg-type]
        self.pool._insert_block_hash(name, page, 4)
        self.erasure.stored([name], tag)
        self.pool.free_blocks([page])
        return int(page.block_id)

    def found(self, block_hash: bytes, group: int) -> bool:
        return self.pool.get_cached_block(block_hash, [group]) is not None  # type: ignore[arg-type]


def test_every_group_and_every_copy_of_a_block_is_erased() -> None:
    """vLLM keeps several pages under one name, and names of several KV cache groups; all of the
    tenant's go, also after it has evicted one copy of several by itself."""
    pool = _Pool()
    mine = [pool.store(b"a" * 32, group, "aa") for group in (0, 0, 0, 1)]
    pool.store(b"b" * 32, 0, "bb")
    pool.pool.evict_blocks({mine[0]})
    pool.erasure.removed([make_block_hash_with_group_id(b"a" * 32, 0)])  # type: ignore[arg-type]
    assert pool.found(b"a" * 32, 0)
    erased = pool.erasure.erase(["aa"])
    assert (erased.blocks, erased.in_use) == (3, 0)
    assert not pool.found(b"a" * 32, 0)
    assert not pool.found(b"a" * 32, 1)
    assert pool.found(b"b" * 32, 0)
    assert set(mine) <= set(pool.wiped)


def test_a_page_that_somebody_holds_is_overwritten_when_it_is_given_back() -> None:
    """Neither before, nor after it went to another request that named it anew."""
    pool = _Pool()
    pages = [pool.store(bytes([65 + n]) * 32, 0, "aa") for n in range(3)]
    held, passed_on, kept = (pool.pool.blocks[page] for page in pages)
    pool.pool.touch([held, passed_on, kept])
    assert pool.erasure.erase(["aa"]).in_use == 3
    assert not set(pages) & set(pool.wiped)
    name = make_block_hash_with_group_id(b"z" * 32, 0)  # type: ignore[arg-type]
    pool.pool._insert_block_hash(name, passed_on, 4)
    pool.pool.free_blocks([held, passed_on])
    pool.erasure.sweep()
    assert set(pages) & set(pool.wiped) == {held.block_id}
    pool.pool.free_blocks([kept])
    pool.erasure.sweep()
    assert set(pages) & set(pool.wiped) == {held.block_id, kept.block_id}


def test_zeroing_takes_exactly_the_pages_that_it_is_told() -> None:
    """Runs of pages, pages that a kernel splits, and layers that have no pages of their own."""
    plain, split, other = torch.ones(8, 2, 4, 3), torch.ones(16, 2, 2, 3), torch.ones(8 * 24)
    worker = SimpleNamespace(model_runner=SimpleNamespace(kv_caches=[plain, split, other]))
    zero_pages(worker, [1, 2, 5, 7], 8)
    gone = [False, True, True, False, False, True, False, True]
    assert [not bool(plain[page].any()) for page in range(8)] == gone
    assert [not bool(split[2 * p : 2 * p + 2].any()) for p in range(8)] == gone
    assert bool(other.all())
    zero_pages(worker, [], 8)
