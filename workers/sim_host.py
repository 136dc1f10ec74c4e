"""The host tier of a simulated engine: a copy of each block, and the oldest go first."""

from collections.abc import Container, Sequence

from kv.catalogue import Tier
from workers.mirror import Change


class SimHost:
    """So many blocks at most; none for an engine without a host tier."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._tags: dict[bytes, str] = {}  # the next to go first
        self._spare: dict[bytes, None] = {}  # those that only requests which yield have used
        self._told: set[bytes] = set()
        self._changed = False

    def __len__(self) -> int:
        return len(self._tags)

    def __contains__(self, key: object) -> bool:
        return key in self._tags

    def room(self, yields: bool) -> int | None:
        """Blocks of one prompt that it takes in from elsewhere; those of one that `yields` displace
        none that stays. None if they pass by it."""
        if not self._total:
            return None
        most = max(1, self._total // 2)
        spare = self._total - len(self._tags) + len(self._spare)
        return min(most, spare) if yields else most

    def put(self, keys: Sequence[bytes], tag: str, yields: bool = False) -> None:
        """A prompt's blocks. Its first become the youngest, as in vLLM; if it `yields`, as many as
        displace none that stays."""
        self._changed = True
        if yields:
            self._put_spare(keys, tag)
            return
        for key in reversed(keys):
            self._spare.pop(key, None)
            self._tags.pop(key, None)
            self._tags[key] = tag
        while len(self._tags) > self._total:
            self._drop()

    def _put_spare(self, keys: Sequence[bytes], tag: str) -> None:
        new = [key for key in keys if key not in self._tags]
        displaced = len(self._spare) - sum(key in self._spare for key in keys)
        room = self._total - len(self._tags) + displaced
        for key in keys:
            if key in self._spare:
                self._spare[key] = self._spare.pop(key)
        for key in reversed(new[:room]):
            self._tags[key] = tag
            self._spare[key] = None
        while len(self._tags) > self._total:
            self._drop()

    def _drop(self) -> None:
        key = next(iter(self._spare or self._tags))
        self._spare.pop(key, None)
        del self._tags[key]

    def reach(self, keys: Sequence[bytes], depth: int, brought: Container[bytes] = ()) -> int:
        """How many of the leading `keys` are here, or were brought, or are among the first
        `depth`."""
        behind = range(depth, len(keys))
        lacking = (at for at in behind if keys[at] not in self._tags and keys[at] not in brought)
        return next(lacking, len(keys))

    def erase(self, tags: Sequence[str]) -> None:
        """Forget the blocks of these tags."""
        self._changed = True
        self._tags = {key: tag for key, tag in self._tags.items() if tag not in tags}
        self._spare = {key: None for key in self._spare if key in self._tags}

    def clear(self) -> None:
        """Forget every block."""
        self._changed = True
        self._tags.clear()
        self._spare.clear()

    def take(self) -> Change:
        """The net change since the last call."""
        if not self._changed:
            return Change(tier=Tier.HOST)
        self._changed = False
        stored = [key for key in self._tags if key not in self._told]
        removed = self._told - self._tags.keys()
        self._told = set(self._tags)
        return Change(b"".join(stored), b"".join(removed), Tier.HOST)

    def snapshot(self) -> bytes:
        """Every block, concatenated."""
        return b"".join(self._tags)
