"""Lookups of a split: the head from the replica that computes it, the tail from a tier, at once.

vLLM looks a prompt up from its start, goes on behind a block that comes later, and starts to fetch
what it finds on the way: so the tail is fetched while the head is waited for. What is added here is
that each side has its own tiers, and that the tail's bring the head too once the peer will not.
"""

import time

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    TierFilter,
    TierMatcher,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from kv.head import Head, head_of
from kv.promoted import Promoted

_PEER = TierFilter((TierMatcher(Medium.CPU, Locality.REMOTE),))


class SplitLookups(TieringOffloadingManager):
    """vLLM's manager, for requests with a `Head` too. The engine's thread only.

    `one_group`: the model's layers are looked up in one go, so that a miss ends it.
    """

    one_group = False
    _step = 0

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self._step += 1

    def on_new_request(
        self, req_context: ReqContext, *, exclude_tier_idx: int | None = None
    ) -> RequestOffloadingContext:
        head = head_of(req_context.kv_transfer_params)
        if head is not None:
            req_context.set_state(head)
        return super().on_new_request(req_context, exclude_tier_idx=exclude_tier_idx)

    def lookup(
        self, key: OffloadKey, req_context: ReqContext, *, exclude_tier_idx: int | None = None
    ) -> LookupResult:
        head = req_context.get_state(Head)
        end_token = req_context.get_offload_key_position(key)
        if head is not None and head.is_peers(key, end_token):
            found = self._lookup_at_peer(key, req_context)
            if found is not LookupResult.MISS:
                return found
            self._lost(head, key, req_context)
        return super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)

    def _between_looks(self, key: OffloadKey, req_context: ReqContext) -> LookupResult | None:
        """What ends the search of this step, in which a waiting split is not looked at."""
        head = req_context.get_state(Head)
        if head is None or not self.one_group:
            return None
        rests = head.rests(key, self._step, time.monotonic())
        if rests is False:
            return None
        return LookupResult.RETRY if rests is None else LookupResult.MISS

    def _lookup_at_peer(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        others, req_context.load_tier_filter = req_context.load_tier_filter, _PEER
        try:
            return super().lookup(key, req_context)
        finally:
            req_context.load_tier_filter = others

    def _lost(self, head: Head, key: OffloadKey, req_context: ReqContext) -> None:
        """The peer will not bring this one. Whoever else has it may be asked once."""
        head.missed.add(key)
        promoted = req_context.get_state(Promoted)
        if promoted is not None:
            promoted.keys.discard(key)
