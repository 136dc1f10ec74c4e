"""Which parts of one large memory are taken: best fit over the holes, which coalesce.

Offsets only, no memory. What fits into one hole lies in one piece. What fits into none is scattered
over the largest, so that `take` fails for want of bytes and for nothing else: a ledger that counts
bytes (`charge`) never promises what the arena cannot place.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from kv.errors import VaultError

GRANULE_BYTES = 4096


class Extent(NamedTuple):
    """Bytes [offset, offset + n_bytes) of the arena."""

    offset: int
    n_bytes: int


class Arena:
    """See the module. Every operation costs a search among the holes, O(log n), and a shift of
    their list. Raises VaultError for an arena below one granule.
    """

    def __init__(self, n_bytes: int, granule_bytes: int = GRANULE_BYTES) -> None:
        if granule_bytes < 1 or n_bytes < granule_bytes:
            raise VaultError(
                "vault arena", f"{n_bytes} bytes in granules of {granule_bytes}", "give it more"
            )
        self._granule_bytes = granule_bytes
        self.n_bytes = n_bytes - n_bytes % granule_bytes
        self._lengths: dict[int, int] = {}  # of holes by where they begin
        self._starts: dict[int, int] = {}  # of holes by where they end
        self._order: list[tuple[int, int]] = []  # holes by length and start
        self._taken: dict[int, int] = {}  # lengths by start
        self.free_bytes = 0
        self._add_hole(0, self.n_bytes)

    def charge(self, n_bytes: int) -> int:
        """What `n_bytes` take of the arena, in whole granules."""
        return -(-n_bytes // self._granule_bytes) * self._granule_bytes

    def take(self, n_bytes: int) -> tuple[Extent, ...] | None:
        """Room for `n_bytes`, in one piece where there is one; None if less is free.

        The extents are whole granules; `trimmed` cuts them to the bytes asked for.
        """
        wanted = self.charge(n_bytes)
        if n_bytes < 1 or wanted > self.free_bytes:
            return None
        at = bisect_left(self._order, (wanted, 0))
        if at < len(self._order):
            return (self._cut(self._order[at][1], wanted),)
        pieces = []
        while wanted:
            length, start = self._order[-1]
            pieces.append(self._cut(start, min(length, wanted)))
            wanted -= pieces[-1].n_bytes
        return tuple(pieces)

    def give(self, extents: Iterable[Extent]) -> None:
        """What `take` gave is free again. Raises VaultError for anything that is not taken."""
        for offset, n_bytes in extents:
            if self._taken.get(offset) != n_bytes:
                raise VaultError(
                    f"vault arena at {offset}",
                    f"{n_bytes} bytes given back, {self._taken.get(offset, 0)} taken",
                    "report it",
                )
            del self._taken[offset]
            self._add_hole(offset, n_bytes)

    def check_integrity(self) -> None:
        """Holes and what is taken cover the arena once. Raises VaultError otherwise."""
        at = 0
        parts = sorted([*self._lengths.items(), *self._taken.items()])
        for offset, n_bytes in parts:
            if offset != at:
                raise VaultError("vault arena", f"a part at {offset}, not {at}", "report it")
            at += n_bytes
        books = (at, sum(self._lengths.values()), sorted((n, s) for s, n in self._lengths.items()))
        if books != (self.n_bytes, self.free_bytes, self._order):
            raise VaultError("vault arena", f"{at} bytes, {self.free_bytes} free", "report it")

    def _cut(self, start: int, n_bytes: int) -> Extent:
        """Take the head of a hole."""
        length = self._remove_hole(start)
        if length > n_bytes:
            self._add_hole(start + n_bytes, length - n_bytes)
        self._taken[start] = n_bytes
        return Extent(start, n_bytes)

    def _add_hole(self, start: int, n_bytes: int) -> None:
        end = start + n_bytes
        if start in self._starts:
            start = self._starts[start]
            self._remove_hole(start)
        if end in self._lengths:
            end += self._remove_hole(end)
        self._lengths[start] = end - start
        self._starts[end] = start
        insort(self._order, (end - start, start))
        self.free_bytes += end - start

    def _remove_hole(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[start + length]
        del self._order[bisect_left(self._order, (length, start))]
        self.free_bytes -= length
        return length


def trimmed(extents: Iterable[Extent], n_bytes: int) -> tuple[Extent, ...]:
    """The first `n_bytes` of these extents."""
    kept = []
    for offset, length in extents:
        if n_bytes > 0:
            kept.append(Extent(offset, min(length, n_bytes)))
        n_bytes -= length
    return tuple(kept)
