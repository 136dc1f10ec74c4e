"""The paged KV of a simulated engine: pages that requests hold, and blocks that stay findable."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kv.salt import UNTAGGED
from workers.mirror import Change

# Begins the name of a page whose block was erased while somebody holds it. Longer than a key
# together with its number, so that it is none.
_GHOST = b"erased block "


@dataclass(slots=True, eq=False)
class Grant:
    """Pages of one request: `named` blocks, shared with whoever finds them, and `private` ones."""

    named: list[bytes] = field(default_factory=list)
    private: int = 0


class Pages:
    """A fixed number of pages. Blocks that nobody holds stay until their page is needed, the
    least recently held first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._private = 0
        self._holders: dict[bytes, int] = {}  # every named block
        self._idle: dict[bytes, None] = {}  # those that nobody holds, next to go first
        self._spare: set[bytes] = set()  # those that only requests which yield have used
        self._first: dict[bytes, None] = {}  # of these the idle ones: they go before the others
        self._told: set[bytes] = set()
        self._touched: dict[bytes, None] = {}
        self._tags: dict[bytes, str] = {}
        self._ghosts = 0

    @property
    def held(self) -> int:
        """Pages that some request holds."""
        return self._private + len(self._holders) - len(self._idle)

    def depth(self, keys: Sequence[bytes]) -> int:
        """How many of the leading `keys` are here."""
        return next((i for i, key in enumerate(keys) if key not in self._holders), len(keys))

    def grant(self, named: Sequence[bytes], private: int, yields: bool = False) -> Grant | None:
        """Hold blocks that are here and `private` more pages; None if they do not fit now."""
        idle = sum(key in self._idle for key in named)
        if self.held + idle + private > self.total:
            return None
        for key in named:
            self._hold(key)
        if not yields:
            self._spare.difference_update(named)
        self._private += private
        self._evict()
        return Grant(list(named), private)

    def publish(
        self, grant: Grant, keys: Sequence[bytes], tag: str = UNTAGGED, yields: bool = False
    ) -> None:
        """Private pages of `grant` now hold these blocks, to be found again by `tag`; the ones it
        had named are skipped. Those of a request that `yields` are the first to go."""
        new = keys[len(grant.named) :]
        if yields:
            self._spare.update(key for key in new if key not in self._holders)
        else:
            self._spare.difference_update(new)
        for key in new:
            grant.private -= 1
            self._private -= 1
            self._hold(key)
            self._tags[key] = tag
            grant.named.append(key)

    def release(self, grant: Grant) -> None:
        """Give all pages back. A prompt's last blocks go before its first, as in vLLM."""
        self._private -= grant.private
        for key in reversed(grant.named):
            self._holders[key] -= 1
            if not self._holders[key]:
                self._idle[key] = None
                if key in self._spare:
                    self._first[key] = None
                if _is_ghost(key):
                    self._forget(key)
        grant.named, grant.private = [], 0

    def clear(self) -> None:
        """Forget every block that nobody holds."""
        for key in list(self._idle):
            self._forget(key)

    def erase(self, tags: Sequence[str], grants: Iterable[Grant]) -> tuple[int, int]:
        """Let nobody find the blocks of these tags; how many there were, and how many of them
        `grants`, which are all there are, hold on to."""
        erased = [key for key, tag in self._tags.items() if tag in tags]
        ghosts = {key: self._to_ghost(key) for key in erased if key not in self._idle}
        for grant in grants:
            grant.named = [ghosts.get(key, key) for key in grant.named]
        for key in erased:
            if key in self._idle:
                self._forget(key)
        return len(erased), len(ghosts)

    def _to_ghost(self, key: bytes) -> bytes:
        """Give a held page a name that no prompt has."""
        self._ghosts += 1
        ghost = _GHOST + self._ghosts.to_bytes(8, "big")
        self._holders[ghost] = self._holders.pop(key)
        self._spare.discard(key)
        del self._tags[key]
        self._touched[key] = None
        return ghost

    def take(self) -> Change:
        """The net change since the last call."""
        touched, self._touched = self._touched, {}
        stored = [key for key in touched if key in self._holders and key not in self._told]
        removed = [key for key in touched if key not in self._holders and key in self._told]
        self._told.update(stored)
        self._told.difference_update(removed)
        return Change(b"".join(stored), b"".join(removed))

    def snapshot(self) -> bytes:
        """Every block that can be found."""
        return b"".join(key for key in self._holders if not _is_ghost(key))

    def check(self, grants: Iterable[Grant]) -> None:
        """Raise unless these grants hold exactly the pages that are held."""
        grants = list(grants)
        named = Counter(key for grant in grants for key in grant.named)
        private = sum(grant.private for grant in grants)
        held = {key: count for key, count in self._holders.items() if count}
        if named != held or private != self._private:
            raise RuntimeError(
                f"{self._private} private pages and {len(held)} blocks held, "
                f"{private} and {len(named)} granted"
            )
        if self.held > self.total or self._idle.keys() != self._holders.keys() - held.keys():
            raise RuntimeError(f"{self.held} of {self.total} pages held, {len(self._idle)} idle")

    def _hold(self, key: bytes) -> None:
        if key not in self._holders:
            self._touched[key] = None
        self._holders[key] = self._holders.get(key, 0) + 1
        self._idle.pop(key, None)
        self._first.pop(key, None)

    def _evict(self) -> None:
        while self._private + len(self._holders) > self.total:
            self._forget(next(iter(self._first or self._idle)))

    def _forget(self, key: bytes) -> None:
        del self._idle[key], self._holders[key]
        self._first.pop(key, None)
        self._spare.discard(key)
        self._tags.pop(key, None)
        if not _is_ghost(key):
            self._touched[key] = None


def _is_ghost(key: bytes) -> bool:
    return key.startswith(_GHOST)
