"""Which stored block goes first: by value density or least recently used, leaves before parents.

A block is of no use without the blocks before it, so only leaves can go: blocks with none stored
behind them. Of these the one with the lowest rank goes. By value density a rank is the prefill
seconds that a block saves a second of its stay, for each of its bytes:

    recompute seconds saved x estimated reuse rate / bytes

Deeper blocks cost more to compute (`recompute_s`), so the long tails of conversations stay longest
among equally likely ones. All times are seconds of the caller's clock.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple, Protocol

from kv.curve import PrefillCurve
from kv.reuse import ReuseHistory, kind_of

# Out-of-date entries that a heap may hold for each one in use, and a floor that spares small ones.
_STALE_SHARE = 2
_STALE_FLOOR = 64


def recompute_s(curve: PrefillCurve, start_token: int, n_tokens: int) -> float:
    """Prefill seconds saved by having tokens [start, start + n) when all before them are there.

    a*n + b*((start + n)^2 - start^2): the fixed cost of a prefill is paid all the same.
    """
    return curve.seconds(n_tokens, start_token) - curve.base_s


@dataclass(slots=True, eq=False)
class Entry:
    """One block in a ledger, and what a policy may judge it by.

    `generation` counts the turns before it: those of its ancestors that had been used again when
    what follows them was stored.
    """

    key: bytes
    parent: bytes | None
    tenant: str
    n_bytes: int
    seconds_saved: float
    last_used_s: float
    generation: int = 0
    hits: int = 0
    expires_s: float = inf
    # Whose write is under way; None once acknowledged.
    writer: str | None = None
    writer_end_s: float = inf
    leases: dict[str, float] = field(default_factory=dict)  # ends by owner
    pins: set[str] = field(default_factory=set)

    @property
    def held(self) -> bool:
        """Whether somebody writes it, leases it or has it pinned."""
        return self.writer is not None or bool(self.leases) or bool(self.pins)


class Rank(NamedTuple):
    """Lower goes first. True until `until_s`, or until the block is used again."""

    worth: float
    until_s: float


class Policy(Protocol):
    """What a block is worth keeping."""

    name: str

    def seen(self, entry: Entry, now_s: float) -> None:
        """The block was stored or used just now; its history is up to date."""
        ...

    def rank(self, entry: Entry, now_s: float) -> Rank:
        """Where it stands among the leaves."""
        ...


class Lru:
    """Least recently used goes first: the baseline."""

    name = "lru"

    def seen(self, entry: Entry, now_s: float) -> None:
        """Nothing is learned."""

    def rank(self, entry: Entry, now_s: float) -> Rank:
        """By the time of the last use alone."""
        return Rank(entry.last_used_s, inf)


class ValueDensity:
    """The least recompute seconds saved a second of stay and byte goes first."""

    name = "value"

    def __init__(self, history: ReuseHistory | None = None) -> None:
        self._history = history or ReuseHistory()

    def seen(self, entry: Entry, now_s: float) -> None:
        """The reuse rates learn from it."""
        self._history.seen(entry.key, kind_of(entry.hits, entry.generation), now_s)

    def rank(self, entry: Entry, now_s: float) -> Rank:
        """True until the block's age reaches the next bin of the rates."""
        kind = kind_of(entry.hits, entry.generation)
        rate, next_age_s = self._history.rate(kind, now_s - entry.last_used_s)
        worth = entry.seconds_saved * rate / entry.n_bytes
        return Rank(worth, entry.last_used_s + next_age_s)


class Leaves:
    """The blocks that may be evicted, lowest rank first.

    Heaps with lazy deletion: every operation is O(log n) amortised, and a rank that ends is made
    anew once by the first operation after its end.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._ranks: dict[bytes, tuple[int, Entry, Rank]] = {}  # stamp, block, its rank
        self._order: list[tuple[float, int, bytes]] = []
        self._ends: list[tuple[float, int, bytes]] = []
        self._stamp = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._ranks

    def offer(self, entry: Entry, now_s: float) -> None:
        """The block may go from now on, or is ranked anew."""
        self._stamp += 1
        rank = self._policy.rank(entry, now_s)
        self._ranks[entry.key] = (self._stamp, entry, rank)
        heappush(self._order, (rank.worth, self._stamp, entry.key))
        if rank.until_s < inf:
            heappush(self._ends, (rank.until_s, self._stamp, entry.key))
        self._order = self._cleared(self._order)
        self._ends = self._cleared(self._ends)

    def withdraw(self, key: bytes) -> None:
        """The block is gone or may not go; one that was never offered changes nothing."""
        self._ranks.pop(key, None)

    def lowest(self, now_s: float, spared: bytes | None = None) -> tuple[Entry, Rank] | None:
        """The block to evict first, other than `spared`; None where there is none."""
        self._renew(now_s)
        aside = None
        while self._order and not self._current(self._order[0], spared):
            top = heappop(self._order)
            if top[2] == spared and self._valid(top):
                aside = top
        found = self._ranks[self._order[0][2]] if self._order else None
        if aside is not None:
            heappush(self._order, aside)
        return None if found is None else (found[1], found[2])

    def _renew(self, now_s: float) -> None:
        due = []
        while self._ends and self._ends[0][0] <= now_s:
            top = heappop(self._ends)
            if self._valid(top):
                due.append(self._ranks[top[2]][1])
        for entry in due:
            self.offer(entry, now_s)

    def _current(self, item: tuple[float, int, bytes], spared: bytes | None) -> bool:
        return item[2] != spared and self._valid(item)

    def _valid(self, item: tuple[float, int, bytes]) -> bool:
        ranked = self._ranks.get(item[2])
        return ranked is not None and ranked[0] == item[1]

    def _cleared(self, heap: list[tuple[float, int, bytes]]) -> list[tuple[float, int, bytes]]:
        """Without what is out of date, once that is most of it."""
        if len(heap) <= _STALE_FLOOR + (1 + _STALE_SHARE) * len(self._ranks):
            return heap
        kept = [item for item in heap if self._valid(item)]
        heapify(kept)
        return kept
