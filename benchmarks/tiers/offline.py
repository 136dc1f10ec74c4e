"""What no eviction policy can beat on a trace: an offline upper bound on the seconds saved.

A hit of a block needs it stored all the time since the request that used it before: an interval of
requests, worth the block's recompute seconds. Whatever a policy does, at most as many intervals as
the store has places overlap between two requests. The bound is that of the best such choice of
intervals, made with the whole trace known. It asks for less than a real store does: a block
counts without the blocks before it, and a request's own blocks take no places while it runs. So
every policy, offline ones too, saves at most this.

The best choice is a linear program. Instead of solving it, prices for a place between two requests
are searched (its Lagrangian dual, by subgradients): at any prices, what all intervals are worth
above their price, and all places paid for, is at least the program's optimum. So the bound holds
however far the search came; a longer one can only make it tighter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Steps of the search, and what its moving averages forget (Adam, Kingma and Ba 2015).
STEPS = 600
_FIRST, _SECOND, _TINY = 0.9, 0.99, 1e-6
# The first step in average worths, and after how many steps it is half as long.
_STEP, _HALF = 0.01, 150.0


def upper_bound(
    requests: Sequence[Sequence[bytes]], seconds_saved: Sequence[float], places: int
) -> float:
    """Seconds that a store of `places` blocks saves at most; `seconds_saved` is by depth."""
    starts, ends, worths = _intervals(requests, seconds_saved)
    if not len(worths) or places < 1:
        return 0.0
    n = len(requests)
    prices, best = np.zeros(n), float(worths.sum())
    first, second = np.zeros(n), np.zeros(n)
    for step in range(1, STEPS + 1):
        paid = np.concatenate([[0.0], np.cumsum(prices)])
        above = worths - (paid[ends] - paid[starts])
        taken = above > 0.0
        best = min(best, float(above[taken].sum() + places * prices.sum()))
        held = np.bincount(starts[taken], minlength=n) - np.bincount(ends[taken], minlength=n)
        slope = 1.0 - np.cumsum(held) / places
        first = _FIRST * first + (1 - _FIRST) * slope
        second = _SECOND * second + (1 - _SECOND) * slope**2
        length = _STEP * worths.mean() / (1 + step / _HALF)
        towards = first / (1 - _FIRST**step)
        scale = np.sqrt(second / (1 - _SECOND**step)) + _TINY
        prices = np.maximum(0.0, prices - length * towards / scale)
    return best


def _intervals(
    requests: Sequence[Sequence[bytes]], seconds_saved: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Every use of a block but its first: the request before, this request, and its worth."""
    last: dict[bytes, int] = {}
    found: list[tuple[int, int, float]] = []
    for at, keys in enumerate(requests):
        for depth, key in enumerate(keys):
            if key in last:
                found.append((last[key], at, seconds_saved[depth]))
            last[key] = at
    columns = np.array(found, dtype=np.float64).reshape(-1, 3)
    return columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2]
