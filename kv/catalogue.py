"""Who holds which block, in which tier.

A map from block key to a mask of holders, cut into shards because one dict of 10 M keys stalls for
0.56 s when it grows (FACTS.md, "What routing costs"); a shard stalls for a millisecond. A holder
that dies is masked out at once, and its bit is used again only after a sweep has cleared it from
every shard, so a restarted engine is never credited with the blocks it lost.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kv.errors import CatalogueError

# Masks are shared between keys to save 32 bytes a block; past this many the sharing starts anew.
MAX_SHARED_MASKS = 65_536
# Holders of masks that lookups ended with, kept because many prompts begin alike.
MAX_KNOWN_GROUPS = 4096
# The shard is picked by bits of the hash that a shard's own dict, of up to 2**20 slots, leaves out.
SHARD_HASH_SHIFT = 20


class Tier(StrEnum):
    """Where blocks live."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    PEER = "peer"
    VAULT = "vault"

    # Enum's own is a Python function; holders are hashed up to 64 times a lookup.
    __hash__ = str.__hash__


class Holder(NamedTuple):
    """One tier of one replica; a tuple because that hashes four times as fast as a dataclass."""

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

    def __init__(self, shards: int = 4096) -> None:
        if shards < 1:
            raise CatalogueError("catalogue", f"{shards} shards", "give at least 1")
        self._shards: list[dict[bytes, int]] = [{} for _ in range(shards)]
        self._shared_masks: dict[int, int] = {}
        self._bits: dict[Holder, int] = {}  # each holder's bit as a mask of one
        self._holders: dict[int, Holder] = {}  # the inverse of _bits
        self._groups: dict[int, tuple[Holder, ...]] = {}  # holders by mask
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
        if not bit:
            return
        shards, n_shards, share = self._shards, len(self._shards), self._sharing()
        removed = 0
        for key in keys:
            shard = shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards]
            held = shard.get(key, 0)
            if not held & bit:
                continue
            removed += 1
            if left := held ^ bit:
                shard[key] = share(left, left)
            else:
                del shard[key]
        self._blocks[holder] -= removed

    def forget(self, holder: Holder) -> None:
        """All blocks of `holder` are gone: its engine died, restarted or cleared its cache.

        Takes a microsecond; a holder that comes back starts empty, on another bit.
        """
        bit = self._bits.pop(holder, 0)
        if bit:
            del self._holders[bit], self._blocks[holder]
            self._groups.clear()
            self._live ^= bit
            self._forgotten |= bit

    def sweep(self, max_shards: int) -> int:
        """Clear forgotten holders from up to `max_shards` shards, 0.2 to 1 ms for 2,500 blocks.

        Returns how many shards are still to be swept; 0 when every forgotten bit is free again.
        """
        for _ in range(max_shards):
            if not self._sweeping and not self._begin_sweep():
                break
            self._sweep_shard()
        n_shards = len(self._shards)
        under_way = n_shards - self._cursor if self._sweeping else 0
        return under_way + (n_shards if self._forgotten else 0)

    def depths(self, keys: Sequence[bytes], closed: bool = True) -> Mapping[Holder, int]:
        """How many of the leading `keys` each holder has; holders without the first are left out.

        `closed` promises that holders keep prefixes closed, as an engine does that evicts the end
        of a prompt first; then a bisect looks at few of the keys. Where a block was removed from
        mid-chain all the same, a bisect may credit its holder with more than it can use, never
        with less, which can only misroute. Without the promise every key is walked.
        """
        if not (keys and self._live):
            return {}
        shards, first = self._shards, keys[0]
        shard = shards[(hash(first) >> SHARD_HASH_SHIFT) % len(shards)]
        held = self._live & shard.get(first, 0)
        if not held:
            return {}
        return self._bisect(keys, held) if closed else self._walk(keys, held)

    def blocks(self, holder: Holder) -> int:
        """How many blocks `holder` has; 0 for one that is unknown or forgotten."""
        return self._blocks.get(holder, 0)

    def _bisect(self, keys: Sequence[bytes], held: int) -> dict[Holder, int]:
        """The depths of all in `held`, who have the first key; no key is looked at twice."""
        found: dict[Holder, int] = {}
        shards, n_shards = self._shards, len(self._shards)
        groups = [(held, 1, len(keys) + 1)]
        while groups:
            # Whoever is in `held` has a depth in [least, beyond).
            held, least, beyond = groups.pop()
            while beyond - least > 1:
                depth = (least + beyond) >> 1
                key = keys[depth - 1]
                have = held & shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards].get(key, 0)
                if have == held:
                    least = depth
                    continue
                if have:
                    groups.append((have, depth, beyond))
                    held ^= have
                beyond = depth
            self._record(found, held, least)
        return found

    def _walk(self, keys: Sequence[bytes], held: int) -> dict[Holder, int]:
        """The same, key by key: exact whatever was removed."""
        found: dict[Holder, int] = {}
        shards, n_shards = self._shards, len(self._shards)
        for depth, key in enumerate(keys):
            left = held & shards[(hash(key) >> SHARD_HASH_SHIFT) % n_shards].get(key, 0)
            if left != held:
                self._record(found, held ^ left, depth)
                held = left
                if not held:
                    return found
        self._record(found, held, len(keys))
        return found

    def _record(self, found: dict[Holder, int], mask: int, depth: int) -> None:
        one = self._holders.get(mask)
        if one is not None:
            found[one] = depth
            return
        group = self._groups.get(mask) or self._group(mask)
        found.update(dict.fromkeys(group, depth))

    def _group(self, mask: int) -> tuple[Holder, ...]:
        if len(self._groups) >= MAX_KNOWN_GROUPS:
            self._groups.clear()
        holders, left = [], mask
        while left:
            bit = left & -left
            holders.append(self._holders[bit])
            left ^= bit
        self._groups[mask] = group = tuple(holders)
        return group

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
