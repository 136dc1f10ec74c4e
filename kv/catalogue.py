"""Who holds which block, in which tier.

A map from block key to a mask of holders, cut into shards because one dict of 10 M keys stalls for
0.56 s when it grows (FACTS.md, "What routing costs"); a shard stalls for a millisecond. A holder
that dies is masked out at once, and its bit is used again only after a sweep has cleared it from
every shard, so a restarted engine is never credited with the blocks it lost.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kv.errors import CatalogueError

# Masks are shared between keys to save 32 bytes a block; past this many the sharing starts anew.
MAX_SHARED_MASKS = 65_536
# The shard is picked by bits of the hash that a shard's own dict, of up to 2**20 slots, leaves out.
SHARD_HASH_SHIFT = 20


class Tier(StrEnum):
    """Where blocks live."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    PEER = "peer"
    VAULT = "vault"


@dataclass(frozen=True, slots=True)
class Holder:
    """One tier of one replica."""

    replica: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class Delta:
    """The net change of one holder: first `cleared` (all is gone), then `removed`, then `stored`.

    Keys are those of `kv.block.chain`.
    """

    holder: Holder
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    cleared: bool = False


class Catalogue:
    """Blocks by key, and the holders of each. For one thread at a time. Raises CatalogueError for
    no shards.
    """

    def __init__(self, shards: int = 1024) -> None:
        if shards < 1:
            raise CatalogueError("catalogue", f"{shards} shards", "give at least 1")
        self._shards: list[dict[bytes, int]] = [{} for _ in range(shards)]
        self._shared_masks: dict[int, int] = {}
        self._bits: dict[Holder, int] = {}  # each holder's bit as a mask of one
        self._holders: dict[int, Holder] = {}  # the inverse of _bits
        self._blocks: dict[Holder, int] = {}
        self._live = 0  # all bits in _bits
        self._forgotten = 0  # bits that wait for a sweep to begin
        self._sweeping = 0  # bits that shards before _cursor no longer have
        self._cursor = 0
        self._free: list[int] = []
        self._next_bit = 1

    def apply(self, delta: Delta) -> None:
        """Follow one change of one holder."""
        if delta.cleared:
            self.forget(delta.holder)
        self.remove(delta.holder, delta.removed)
        self.add(delta.holder, delta.stored)

    def add(self, holder: Holder, keys: Iterable[bytes]) -> None:
        """`holder` has these blocks now; those it had already change nothing."""
        bit = self._bits.get(holder) or self._enter(holder)
        shards, n_shards, share = self._shards, len(self._shards), self._sharing()
        added = 0
        for key in keys:
            shard = shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards]
            held = shard.get(key, 0)
            if not held & bit:
                shard[key] = share(held | bit, held | bit)
                added += 1
        self._blocks[holder] += added

    def remove(self, holder: Holder, keys: Iterable[bytes]) -> None:
        """`holder` no longer has these blocks; those it never had change nothing."""
        bit = self._bits.get(holder, 0)
        shards, n_shards, share = self._shards, len(self._shards), self._sharing()
        for key in keys:
            shard = shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards]
            held = shard.get(key, 0)
            if not held & bit:
                continue
            self._blocks[holder] -= 1
            if left := held ^ bit:
                shard[key] = share(left, left)
            else:
                del shard[key]

    def forget(self, holder: Holder) -> None:
        """All blocks of `holder` are gone: its engine died, restarted or cleared its cache.

        Takes a microsecond; a holder that comes back starts empty, on another bit.
        """
        bit = self._bits.pop(holder, 0)
        if bit:
            del self._holders[bit], self._blocks[holder]
            self._live ^= bit
            self._forgotten |= bit

    def sweep(self, max_shards: int) -> int:
        """Clear forgotten holders from up to `max_shards` shards, about 1 ms for 10,000 blocks.

        Returns how many shards are still to be swept; 0 when every forgotten bit is free again.
        """
        for _ in range(max_shards):
            if not self._sweeping and not self._begin_sweep():
                break
            self._sweep_shard()
        n_shards = len(self._shards)
        under_way = n_shards - self._cursor if self._sweeping else 0
        return under_way + (n_shards if self._forgotten else 0)

    def depths(self, keys: Sequence[bytes]) -> Mapping[Holder, int]:
        """How many of the leading `keys` each holder has; holders without the first are left out.

        A linear walk: unlike a bisect it is exact where a block was removed from mid-chain.
        """
        shards, n_shards = self._shards, len(self._shards)
        found: dict[Holder, int] = {}
        held = self._live
        for depth, key in enumerate(keys):
            left = held & shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards].get(key, 0)
            if left != held:
                self._record(found, held ^ left, depth)
                held = left
                if not held:
                    return found
        self._record(found, held, len(keys))
        return found

    def blocks(self, holder: Holder) -> int:
        """How many blocks `holder` has; 0 for one that is unknown or forgotten."""
        return self._blocks.get(holder, 0)

    def _record(self, found: dict[Holder, int], mask: int, depth: int) -> None:
        while depth and mask:
            bit = mask & -mask
            found[self._holders[bit]] = depth
            mask ^= bit

    def _enter(self, holder: Holder) -> int:
        if self._free:
            bit = self._free.pop()
        else:
            bit = self._next_bit
            self._next_bit <<= 1
        self._bits[holder] = bit
        self._holders[bit] = holder
        self._blocks[holder] = 0
        self._live |= bit
        return bit

    def _begin_sweep(self) -> bool:
        self._sweeping, self._forgotten = self._forgotten, 0
        self._cursor = 0
        return bool(self._sweeping)

    def _sweep_shard(self) -> None:
        keep, share = ~self._sweeping, self._sharing()
        shard = self._shards[self._cursor]
        # A new dict, because one that only loses keys never gives its memory back.
        self._shards[self._cursor] = {
            key: share(left, left) for key, held in shard.items() if (left := held & keep)
        }
        self._cursor += 1
        if self._cursor == len(self._shards):
            self._end_sweep()

    def _end_sweep(self) -> None:
        while self._sweeping:
            bit = self._sweeping & -self._sweeping
            self._free.append(bit)
            self._sweeping ^= bit

    def _sharing(self) -> Callable[[int, int], int]:
        if len(self._shared_masks) > MAX_SHARED_MASKS:
            self._shared_masks.clear()
        return self._shared_masks.setdefault
