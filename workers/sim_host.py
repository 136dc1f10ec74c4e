"""The host tier of a simulated engine: a copy of each block, and the oldest go first."""

from collections.abc import Sequence

from kv.catalogue import Tier
from workers.mirror import Change


class SimHost:
    """So many blocks at most; none for an engine without a host tier."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tags: dict[bytes, str] = {}  # the next to go first
        self._told: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._tags)

    def put(self, keys: Sequence[bytes], tag: str) -> None:
        """A prompt's blocks. Its first become the youngest, as in vLLM."""
        for key in reversed(keys):
            self._tags.pop(key, None)
            self._tags[key] = tag
        while len(self._tags) > self._total:
            del self._tags[next(iter(self._tags))]

    def reach(self, keys: Sequence[bytes], depth: int) -> int:
        """How many of the leading `keys` are here, or among the first `depth`."""
        behind = range(depth, len(keys))
        return next((at for at in behind if keys[at] not in self._tags), len(keys))

    def erase(self, tags: Sequence[str]) -> None:
        """Forget the blocks of these tags."""
        self._tags = {key: tag for key, tag in self._tags.items() if tag not in tags}

    def clear(self) -> None:
        """Forget every block."""
        self._tags.clear()

    def take(self) -> Change:
        """The net change since the last call."""
        stored = [key for key in self._tags if key not in self._told]
        removed = self._told - self._tags.keys()
        self._told = set(self._tags)
        return Change(b"".join(stored), b"".join(removed), Tier.HOST)

    def snapshot(self) -> bytes:
        """Every block, concatenated."""
        return b"".join(self._tags)
