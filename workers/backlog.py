"""What an engine has still to compute of the prompts that it was given.

vLLM looks into its cache when it schedules a request: until then its books say that all of the
prompt is lacking. A queue that is told by those makes a replica that has nearly all of a
conversation look busy for seconds, and the conversation is computed anew elsewhere.
"""

from typing import Any

from vllm.v1.request import Request, RequestStatus

_RECEIVING = RequestStatus.WAITING_FOR_REMOTE_KVS


class Backlog:
    """Of one vLLM scheduler; on the engine's thread."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._cached: dict[str, int] = {}

    def admit(self, request: Request) -> None:
        """A request that was just queued: what the paged KV has of its prompt now."""
        manager = self._scheduler.kv_cache_manager
        if manager.prefix_cache_lookup_enabled(request):
            find = manager.coordinator.find_longest_cache_hit
            _, cached, _ = find(request.block_hashes, request.num_tokens - 1)
            self._cached[request.request_id] = cached

    def tokens(self) -> dict[str, int]:
        """Prompt tokens of each request that has some to compute. A handoff brings them instead,
        and tiers as many as its plan fetches."""
        requests = self._scheduler.requests
        waiting = ((name, requests.get(name)) for name in self._cached)
        self._cached = {
            name: self._cached[name] for name, r in waiting if r and not r.num_computed_tokens
        }
        return {name: left for name, each in requests.items() if (left := self._left(each))}

    def _left(self, request: Request) -> int:
        params = request.kv_transfer_params or {}
        if request.is_finished() or params.get("do_remote_prefill"):
            return 0
        if request.status == _RECEIVING:
            return 0
        cached, fetched = self._cached.get(request.request_id, 0), params.get("max_load_tokens")
        had = request.num_computed_tokens or max(cached, fetched or 0)
        return int(max(0, request.num_prompt_tokens - had))
