"""When leases, writes and lives of blocks end, soonest first.

A heap that is added to and never searched: an end that was put off, or whose block has gone, is
left in it, and comes up to nothing. Once most of it is such ends it is made anew.
"""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from math import inf

from kv.eviction import Entry

# Ends that are watched before those of blocks that have gone are looked for.
FLOOR = 256


class Ends:
    """`there` gives all blocks that have ends."""

    def __init__(self, there: Callable[[], list[Entry]]) -> None:
        self._there = there
        self._heap: list[tuple[float, bytes]] = []
        self._limit = FLOOR

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[tuple[float, bytes]]:
        return iter(self._heap)

    def watch(self, end_s: float, key: bytes) -> None:
        """Something of this block ends then; `inf` is never."""
        if end_s == inf:
            return
        heappush(self._heap, (end_s, key))
        if len(self._heap) > self._limit:
            self._rewatch()

    def due(self, now_s: float) -> Iterator[bytes]:
        """Blocks of which something may have ended by now, each end once. More may be watched
        meanwhile."""
        while self._heap and self._heap[0][0] <= now_s:
            yield heappop(self._heap)[1]

    def clear(self) -> None:
        """Watch nothing."""
        self._heap.clear()

    def _rewatch(self) -> None:
        """Leave out the ends of what went earlier; seldom enough to cost O(1) for each end."""
        there = self._there()
        self._heap = [
            (end_s, entry.key)
            for entry in there
            for end_s in (entry.expires_s, entry.writer_end_s, *entry.leases.values())
            if end_s < inf
        ]
        heapify(self._heap)
        self._limit = max(FLOOR, 2 * len(self._heap), len(there))
