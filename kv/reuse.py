"""How soon a stored block is asked for again, learned from the blocks that were.

A panel of keys, chosen by their own bits so that neither eviction nor popularity biases it, is
followed whether or not its blocks are still stored. For each kind of block it counts reuses, and
the block-seconds in which one could have come, by age since the last use; their ratio is a hazard
rate. Both fade with a half-life. Chat traffic makes this worth its trouble: right after an answer
nobody asks, then a reader types, then the conversation is over, so a rate that only falls with age
keeps the wrong blocks.

A block is judged by the best rate of reuse that keeping it can bring: over all times to keep it
on, the chance of a reuse divided by the expected seconds until that reuse or the end (Gittins'
index of a job with one reward; J. C. Gittins, "Bandit Processes and Dynamic Allocation Indices",
1979).
"""

from bisect import bisect_right
from math import expm1, inf

import numpy as np
from numpy.typing import NDArray

from kv.errors import VaultError

# Ages since the last use, in seconds, at which a bin of the tables begins; the last one ends at
# HORIZON_S, and older than that is as old as that.
EDGES_S = (0, 5, 10, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 720, 1200, 2400)
HORIZON_S = 4800.0
_EDGES_S = np.array(EDGES_S, dtype=np.float64)
_WIDTHS_S = np.diff(np.array([*EDGES_S, HORIZON_S]))
_BINS = len(EDGES_S)
# A kind is how often a block was used again and how many turns lie before it, both capped.
CAP = 3
KINDS = (CAP + 1) ** 2
# What the tables say before anything was seen: one reuse in a quarter of an hour for a block used
# just now, and less for an older one, which is least recently used.
PRIOR_PER_S = 1 / 900
# How many block-seconds of the panel a kind needs until its own counts weigh as much as the average
# of all kinds, and all kinds together until they weigh as much as the next younger age's.
PRIOR_S = 2000.0
# Samples between two makings of the tables: so many, or this part of the panel if it is more.
# Making them reads the whole panel, so that each sample pays for at most so many of its keys.
REFRESH = 256
REFRESH_PART = 128
# An age nobody was yet seen at is half as good as the one before.
UNSEEN = 0.5

Floats = NDArray[np.float64]


def kind_of(hits: int, generation: int) -> int:
    """The kind, below KINDS, of a block used again `hits` times behind `generation` turns."""
    return min(hits, CAP) * (CAP + 1) + min(generation, CAP)


class ReuseHistory:
    """Reuse rates by kind and age. The clock is the caller's, in seconds, and never goes back.

    Follows at most `panel_keys` keys; counts lose half their weight in `half_life_s`. Raises
    VaultError unless both are positive.
    """

    def __init__(self, panel_keys: int = 32_768, half_life_s: float = 3600.0) -> None:
        if panel_keys < 1 or not half_life_s > 0.0:
            raise VaultError(
                "reuse history",
                f"{panel_keys} keys, half-life {half_life_s} s",
                "give at least one key and a half-life above 0 s",
            )
        self._panel_keys = panel_keys
        self._half_life_s = half_life_s
        self._panel: dict[bytes, int] = {}  # slots, in the order of last use
        self._kinds = np.zeros(panel_keys + 1, dtype=np.int64)
        self._last_s = np.zeros(panel_keys + 1)
        self._free = list(range(panel_keys + 1))
        self._below = 1 << 64  # keys whose first 64 bits are below are followed
        self._reuses = np.zeros((KINDS, _BINS))
        self._exposed_s = np.zeros((KINDS, _BINS))
        self._faded_s = -inf
        self._samples = 0
        self._rates = self._tables(self._reuses, self._exposed_s)

    def seen(self, key: bytes, kind: int, now_s: float) -> None:
        """A block was stored or used; it is of this kind from now on."""
        if int.from_bytes(key[:8], "big") >= self._below:
            return
        slot = self._panel.pop(key, -1)
        if slot >= 0:
            self._count(int(self._kinds[slot]), now_s - float(self._last_s[slot]))
        else:
            slot = self._free.pop()
        # Popped first: the panel is in the order of last use.
        self._panel[key] = slot
        self._kinds[slot], self._last_s[slot] = kind, now_s
        while len(self._panel) > self._panel_keys:
            self._thin()
        self._samples += 1
        if self._samples >= max(REFRESH, len(self._panel) // REFRESH_PART):
            self._samples = 0
            self._refresh(now_s)

    def rate(self, kind: int, age_s: float) -> tuple[float, float]:
        """The best reuses a second of a block last used `age_s` ago, and the age in seconds at
        which that changes, `inf` for never."""
        at = bisect_right(EDGES_S, max(0.0, age_s)) - 1
        return self._rates[kind][at], EDGES_S[at + 1] if at + 1 < _BINS else inf

    def _count(self, kind: int, gap_s: float) -> None:
        at = bisect_right(EDGES_S, min(gap_s, HORIZON_S)) - 1
        self._reuses[kind, at] += 1.0
        self._exposed_s[kind, :at] += _WIDTHS_S[:at]
        self._exposed_s[kind, at] += min(gap_s, HORIZON_S) - EDGES_S[at]

    def _thin(self) -> None:
        self._below >>= 1
        for key in [key for key in self._panel if int.from_bytes(key[:8], "big") >= self._below]:
            self._free.append(self._panel.pop(key))
        # What is counted from here on comes from half as many keys.
        self._reuses *= 0.5
        self._exposed_s *= 0.5

    def _refresh(self, now_s: float) -> None:
        if self._faded_s > -inf:
            fade = 0.5 ** ((now_s - self._faded_s) / self._half_life_s)
            self._reuses *= fade
            self._exposed_s *= fade
        self._faded_s = now_s
        while self._panel:
            key, slot = next(iter(self._panel.items()))
            if now_s - self._last_s[slot] <= HORIZON_S:
                break
            self._exposed_s[self._kinds[slot]] += _WIDTHS_S
            self._free.append(self._panel.pop(key))
        self._rates = self._tables(self._reuses, self._exposed_s + self._waiting_s(now_s))

    def _waiting_s(self, now_s: float) -> Floats:
        """Block-seconds of the panel's blocks since their last use, by kind and bin."""
        slots = np.fromiter(self._panel.values(), dtype=np.int64, count=len(self._panel))
        kinds, ages_s = self._kinds[slots], np.minimum(now_s - self._last_s[slots], HORIZON_S)
        bins = np.searchsorted(_EDGES_S, ages_s, side="right") - 1
        cells = kinds * _BINS + bins
        shape = (KINDS, _BINS)
        blocks = np.bincount(cells, minlength=KINDS * _BINS).reshape(shape)
        spent_s = np.bincount(cells, ages_s - _EDGES_S[bins], minlength=KINDS * _BINS)
        # Blocks in a later bin were in each earlier one for all of its width.
        later = blocks.sum(axis=1, keepdims=True) - np.cumsum(blocks, axis=1)
        return np.asarray(spent_s.reshape(shape) + later * _WIDTHS_S)

    def _tables(self, reuses: Floats, exposed_s: Floats) -> list[list[float]]:
        hazards = np.empty(_BINS)
        before = PRIOR_PER_S
        for at, (seen, spent_s) in enumerate(
            zip(reuses.sum(axis=0), exposed_s.sum(axis=0), strict=True)
        ):
            before = (seen + PRIOR_S * before * UNSEEN) / (spent_s + PRIOR_S)
            hazards[at] = before
        own = (reuses + PRIOR_S * hazards) / (exposed_s + PRIOR_S)
        return [_index(row) for row in own.tolist()]


def _index(hazards: list[float]) -> list[float]:
    """Gittins' index at the start of each bin, hazards in 1/s being constant within a bin."""
    indices = []
    for start in range(_BINS):
        left, reward, spent_s, best = 1.0, 0.0, 0.0, 0.0
        for at in range(start, _BINS):
            gone = -left * expm1(-hazards[at] * float(_WIDTHS_S[at]))
            reward += gone
            spent_s += gone / hazards[at] if hazards[at] > 0.0 else left * float(_WIDTHS_S[at])
            best = max(best, reward / spent_s)
            left -= gone
        indices.append(best)
    return indices
