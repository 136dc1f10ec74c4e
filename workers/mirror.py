"""Each worker's mirror of what its engine holds, tier by tier, in catalogue keys.

vLLM names a block by a sha256 chain and publishes tokens and salts with the events of its paged KV.
The mirror turns that into the catalogue's fast keys, once, inside the worker, so that tokens and
salts never leave the process, and keeps the whole set for whoever needs a snapshot.

Tiers tell vLLM's names alone. A name is known from when the paged KV held its block until the last
tier has dropped it. What a tier holds without a known name (found on disk at a start, or
brought from there before the paged KV had it) is counted, and told once the paged KV has named it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kv.block import chain, pack_tokens, root_key
from kv.catalogue import Tier


@dataclass(frozen=True, slots=True)
class Change:
    """Catalogue keys that appeared in a tier and went, each concatenated; no key is in both."""

    stored: bytes = b""
    removed: bytes = b""
    tier: Tier = Tier.DEVICE


@dataclass(slots=True)
class _Held:
    """Engine names that one tier holds, and the keys of what changed since the last report."""

    names: set[bytes] = field(default_factory=set)
    unnamed: int = 0
    stored: dict[bytes, None] = field(default_factory=dict)
    removed: dict[bytes, None] = field(default_factory=dict)


class Mirror:
    """Engine hash → catalogue key, for every block that the engine holds now.

    Not thread-safe: one thread (the engine's) changes it and takes its snapshots.
    """

    def __init__(self) -> None:
        self._keys: dict[bytes, bytes] = {}
        self._held: dict[Tier, _Held] = {tier: _Held() for tier in Tier}
        # Names that a tier has dropped: a report later nobody may hold them any more. Not at once,
        # since vLLM tells what left the paged KV before it tells of the copies that were made.
        self._dropped: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._held[Tier.DEVICE].names)

    def blocks(self, tier: Tier) -> int:
        """How many blocks a tier holds, whether they can be told or not."""
        return len(self._held[tier].names)

    def unnamed(self, tier: Tier) -> int:
        """How many of them nobody can be told of, since their keys are not known."""
        return self._held[tier].unnamed

    def store(
        self,
        hashes: Sequence[bytes],
        parent: bytes | None,
        token_ids: Sequence[int],
        block_tokens: int,
        salt: str | None,
    ) -> None:
        """Blocks that the paged KV now holds, in chain order behind `parent`.

        A block whose parent is unknown is left out: its key cannot be computed, and a block
        that nobody can find is only a lost hit.
        """
        root = root_key(salt) if parent is None else self._keys.get(parent)
        if root is None:
            return
        keys = chain(root, pack_tokens(token_ids), block_tokens)
        for name, key in zip(hashes, keys, strict=True):
            if name not in self._keys:
                self._name(name, key)
        self.hold(Tier.DEVICE, hashes)

    def hold(self, tier: Tier, hashes: Iterable[bytes]) -> None:
        """Blocks that a tier now holds; those it had already change nothing."""
        held = self._held[tier]
        for name in hashes:
            if name in held.names:
                continue
            held.names.add(name)
            key = self._keys.get(name)
            if key is None:
                held.unnamed += 1
            else:
                _cancel_or_note(key, held.removed, held.stored)

    def remove(self, hashes: Iterable[bytes], tier: Tier = Tier.DEVICE) -> None:
        """Blocks that a tier no longer holds; those it never had are ignored."""
        held = self._held[tier]
        for name in hashes:
            if name not in held.names:
                continue
            held.names.remove(name)
            key = self._keys.get(name)
            if key is None:
                held.unnamed -= 1
            else:
                _cancel_or_note(key, held.stored, held.removed)
                self._dropped.add(name)

    def clear(self, tier: Tier = Tier.DEVICE) -> None:
        """A tier dropped all that it held."""
        self.remove(list(self._held[tier].names), tier)

    def take(self) -> tuple[Change, ...]:
        """The net changes since the last call, of each tier that changed."""
        for name in self._dropped:
            if not any(name in held.names for held in self._held.values()):
                del self._keys[name]
        self._dropped.clear()
        return tuple(
            self._change(tier, held)
            for tier, held in self._held.items()
            if held.stored or held.removed
        )

    def snapshot(self, tier: Tier = Tier.DEVICE) -> bytes:
        """Every key that a tier holds, concatenated; see `kv.block.split_keys`."""
        names = self._held[tier].names
        return b"".join(self._keys[name] for name in names if name in self._keys)

    def _name(self, name: bytes, key: bytes) -> None:
        """A name is known from now on; tiers that hold it can tell."""
        self._keys[name] = key
        for held in self._held.values():
            if name in held.names:
                held.unnamed -= 1
                _cancel_or_note(key, held.removed, held.stored)

    def _change(self, tier: Tier, held: _Held) -> Change:
        change = Change(b"".join(held.stored), b"".join(held.removed), tier)
        held.stored, held.removed = {}, {}
        return change


def _cancel_or_note(key: bytes, opposite: dict[bytes, None], noted: dict[bytes, None]) -> None:
    """A store cancels a pending removal of the same key, and the reverse."""
    if key in opposite:
        del opposite[key]
    else:
        noted[key] = None
