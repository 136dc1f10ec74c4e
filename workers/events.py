"""vLLM's block events, fed to the mirror and the erasure; no token leaves the process."""

from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_GPU,
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
)
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.kv_offload.base import Locality

from kv.catalogue import Tier
from workers.erasure import Erasure
from workers.mirror import Mirror

# vLLM's words for where a block lies, without and with the word that it is not this replica's own.
_TIERS = {
    (None, False): Tier.DEVICE,
    (MEDIUM_GPU, False): Tier.DEVICE,
    (MEDIUM_CPU, False): Tier.HOST,
    (MEDIUM_STORAGE, False): Tier.DISK,
    (MEDIUM_CPU, True): Tier.PEER,
    (MEDIUM_STORAGE, True): Tier.VAULT,
}


class MirrorEvents(EventPublisher):
    """Tells the mirror what each tier holds, and the erasure what belongs to whom."""

    def __init__(self, erasure: Erasure) -> None:
        super().__init__()
        self.mirror = Mirror()
        self._erasure = erasure

    def publish(self, events: EventBatch) -> None:
        for event in events.events:
            if isinstance(event, AllBlocksCleared):
                self._erasure.cleared()
                self.mirror.clear()
            elif isinstance(event, BlockStored | BlockRemoved):
                tier = _tier(event)
                if tier is Tier.DEVICE:
                    self._device(event)
                elif tier is not None:
                    self._elsewhere(event, tier)

    def shutdown(self) -> None:
        for tier in Tier:
            self.mirror.clear(tier)

    def _device(self, event: BlockStored | BlockRemoved) -> None:
        if isinstance(event, BlockStored):
            if self._erasure.stored(_in_group(event), event.session_id):
                self._store(event)
            return
        self._erasure.removed(_in_group(event))
        if _first_group(event):
            self.mirror.remove(_raw(name) for name in event.block_hashes)

    def _elsewhere(self, event: BlockStored | BlockRemoved, tier: Tier) -> None:
        """What tiers hold has vLLM's names and nothing else; whose it is they know themselves."""
        if not _first_group(event):
            return
        names = [_raw(name) for name in event.block_hashes]
        if isinstance(event, BlockStored):
            self.mirror.hold(tier, names)
        else:
            self.mirror.remove(names, tier)

    def _store(self, event: BlockStored) -> None:
        # Groups beside the first, and windows that skip blocks, have no chain to be named by.
        whole = len(event.block_hashes) * event.block_size == len(event.token_ids)
        if not _first_group(event) or not whole:
            return
        extra = event.extra_keys[0] if event.extra_keys else None
        if event.lora_name is not None or (extra is not None and len(extra) > 1):
            return  # adapters and images: no catalogue key says what they are
        first = event.parent_block_hash is None
        self.mirror.store(
            [_raw(name) for name in event.block_hashes],
            None if first else _raw(event.parent_block_hash),
            event.token_ids,
            event.block_size,
            salt=extra[0] if extra and first else None,
        )


def _tier(event: BlockStored | BlockRemoved) -> Tier | None:
    """Where the block of an event lies; None for a medium that we do not know."""
    return _TIERS.get((event.medium, event.locality == Locality.REMOTE.value))


def _first_group(event: BlockStored | BlockRemoved) -> bool:
    return event.group_idx in (None, 0)


def _in_group(event: BlockStored | BlockRemoved) -> list[bytes]:
    """The pool's names of an event's blocks."""
    group = event.group_idx or 0
    return [make_block_hash_with_group_id(_raw(name), group) for name in event.block_hashes]


def _raw(name: Any) -> bytes:
    if not isinstance(name, bytes):
        raise TypeError(f"block hash {name!r} is no bytes; VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0")
    return name
