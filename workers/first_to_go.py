"""Blocks of requests that yield are the first that an engine's paged KV gives up.

vLLM hands out free pages from the front of a queue and puts back at its end what has a name. A
block is a yielding one while only yielding requests have used it; once nobody reads it, its page is
put to the front. Pages without a name are there already and go first: so nothing is moved while the
next step finds enough of those.

What a yielding request takes while it runs can be an urgent block's page: the least recently used
ones, once. Those that follow it reuse its pages.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import BlockHash, get_block_hash
from vllm.v1.request import Request


class FirstToGo:
    """Of one vLLM scheduler; on the engine's thread.

    A step is taken to give out `step_pages` pages at most.
    """

    def __init__(self, scheduler: Any, step_pages: int) -> None:
        self._scheduler, self._step_pages = scheduler, step_pages
        self._pool: Any = scheduler.kv_cache_manager.block_pool
        self._groups = range(len(scheduler.kv_cache_config.kv_cache_groups))
        # Yielding blocks in the order in which they were asked for; a prompt's first come first.
        self._names: dict[BlockHash, None] = {}
        # Yielding requests with how many of their names are in `_names`, and how often each was
        # preempted when it was last looked at.
        self._open: dict[str, tuple[Request, int, int]] = {}
        self._freed = False

    def admit(self, request: Request, yields: bool) -> None:
        """Before the scheduler has it: whose its blocks are."""
        if yields:
            names, urgent = request.block_hashes, self._urgent(request)
            new = (name for name in names if name not in urgent and not any(self._pages(name)))
            self._names.update(dict.fromkeys(new))
            self._open[request.request_id] = (request, len(names), 0)
        elif self._names:
            for name in request.block_hashes:
                self._names.pop(name, None)

    def settle(self) -> None:
        """Between two steps: put the pages of yielding requests that ended to the front."""
        if not self._open and not self._freed:
            return
        requests = self._scheduler.requests
        for name, (request, named, preemptions) in list(self._open.items()):
            if name not in requests:
                self._names.update(dict.fromkeys(request.block_hashes[named:]))
                del self._open[name]
            elif request.num_preemptions > preemptions:
                self._open[name] = (request, named, request.num_preemptions)
            else:
                continue
            self._freed = True
        if self._freed and self._displaces():
            self._move()
            self._freed = False

    def _urgent(self, request: Request) -> set[BlockHash]:
        """Blocks of this prompt, and others, that requests which do not yield are computing."""
        first = request.block_hashes[:1]
        others = (
            each
            for name, each in self._scheduler.requests.items()
            if name not in self._open and first and each.block_hashes[:1] == first
        )
        return {name for each in others for name in each.block_hashes}

    def _displaces(self) -> bool:
        """Whether the next step may give out the page of a block that is not a yielding one."""
        queue = self._pool.free_block_queue
        page = queue.fake_free_list_head.next_free_block
        for _ in range(self._step_pages):
            if page is None or page is queue.fake_free_list_tail:
                return True
            if page.block_hash is not None and get_block_hash(page.block_hash) not in self._names:
                return True
            page = page.next_free_block
        return False

    def _move(self) -> None:
        self._drop_unknown()
        queue = self._pool.free_block_queue
        # The last of a prompt go first: without its first blocks none is found.
        pages = [page for name in reversed(self._names) for page in self._pages(name)]
        free = [page for page in pages if page.ref_cnt == 0 and not self._lent(page)]
        for page in free:
            queue.remove(page)
        queue.prepend_n(free)

    def _drop_unknown(self) -> None:
        """Forget the names of blocks that are gone; those of requests that run may yet come."""
        coming = {name for request, *_ in self._open.values() for name in request.block_hashes}
        kept = (name for name in self._names if name in coming or any(self._pages(name)))
        self._names = dict.fromkeys(kept)

    def _pages(self, name: BlockHash) -> Iterator[Any]:
        """The pages of a block, one of each KV cache group that has it."""
        for group in self._groups:
            found: Iterable[Any] = self._pool.get_cached_block(name, [group]) or ()
            yield from found

    def _lent(self, page: Any) -> bool:
        """Whether a connector still reads this free page."""
        return page.block_id in self._pool._reuse_watchers


def step_pages(config: VllmConfig) -> int:
    """Pages that one step may give out: a prompt's that is received, or a chunk's, and one for
    each stream."""
    scheduler, block_tokens = config.scheduler_config, config.cache_config.block_size
    tokens: int = max(config.model_config.max_model_len, scheduler.max_num_batched_tokens)
    return -(-tokens // int(block_tokens)) + int(scheduler.max_num_seqs)
