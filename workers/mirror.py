"""Each worker's mirror of what its engine's paged KV holds, in catalogue keys.

vLLM names a block by a sha256 chain and publishes tokens and salts with every event. The mirror
turns that into the catalogue's fast keys, once, inside the worker, so that tokens and salts never
leave the process, and keeps the whole set for whoever needs a snapshot.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kv.block import chain, pack_tokens, root_key


@dataclass(frozen=True, slots=True)
class Change:
    """Catalogue keys that appeared and went, each concatenated; no key is in both."""

    stored: bytes = b""
    removed: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed)


class Mirror:
    """Engine hash → catalogue key, for every block that the engine holds now.

    Not thread-safe: one thread (the engine's) changes it and takes its snapshots.
    """

    def __init__(self) -> None:
        self._keys: dict[bytes, bytes] = {}
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def store(
        self,
        hashes: Sequence[bytes],
        parent: bytes | None,
        token_ids: Sequence[int],
        block_tokens: int,
        salt: str | None,
    ) -> None:
        """Blocks that the engine now holds, in chain order behind `parent`.

        A block whose parent is unknown is left out: its key cannot be computed, and a block
        that nobody can find is only a lost hit.
        """
        root = root_key(salt) if parent is None else self._keys.get(parent)
        if root is None:
            return
        keys = chain(root, pack_tokens(token_ids), block_tokens)
        for name, key in zip(hashes, keys, strict=True):
            if name not in self._keys:
                self._keys[name] = key
                _cancel_or_note(key, self._removed, self._stored)

    def remove(self, hashes: Iterable[bytes]) -> None:
        """Blocks that the engine evicted; unknown ones are ignored."""
        for name in hashes:
            key = self._keys.pop(name, None)
            if key is not None:
                _cancel_or_note(key, self._stored, self._removed)

    def clear(self) -> None:
        """The engine dropped its whole cache."""
        self.remove(list(self._keys))

    def take(self) -> Change:
        """The net change since the last call."""
        change = Change(b"".join(self._stored), b"".join(self._removed))
        self._stored, self._removed = {}, {}
        return change

    def snapshot(self) -> bytes:
        """Every key held, concatenated; see `kv.block.split_keys`."""
        return b"".join(self._keys.values())


def _cancel_or_note(key: bytes, opposite: dict[bytes, None], noted: dict[bytes, None]) -> None:
    """A store cancels a pending removal of the same key, and the reverse."""
    if key in opposite:
        del opposite[key]
    else:
        noted[key] = None
