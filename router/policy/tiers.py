"""What each replica would take from its own tiers before it computes the rest of a prompt.

Tiers are asked in a fixed order, and each continues where those before it end. On one tier the cost
is concave in the tokens, so a part of what it has is never better than the better of all and
nothing. What is compared for each replica is to take nothing, to take all of the first tier, of the
first two, and so on; a tier that is slower than computing is not among the best of these.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.columns import Floats, TierColumns

# Fetching is chosen for what it saves, not for the order of additions.
_GAIN = 1e-9


class Taken(NamedTuple):
    """By replica: how many of the tiers are used, the tokens that need not be computed then, and
    the seconds until they are there."""

    through: NDArray[np.int64]
    hit_tokens: Floats
    seconds: Floats


def take(
    tiers: TierColumns,
    hit_tokens: Floats,
    token_bytes: int,
    computing: Callable[[Floats], Floats],
    slack: float = 0.0,
) -> Taken:
    """The cheapest for each replica; with `slack` the most that costs no more than that ratio on
    top of it.

    `hit_tokens` are those in its paged KV; `computing` is what computing behind so many tokens
    costs each replica, in the seconds that fetching is counted by.
    """
    through = np.zeros(len(hit_tokens), np.int64)
    best_hit, best_s, reach = hit_tokens, np.zeros(len(hit_tokens)), hit_tokens
    least, spent_s = computing(hit_tokens), np.zeros(len(hit_tokens))
    for place in range(len(tiers.order)):
        further = np.maximum(reach, tiers.tokens[place])
        span_bytes = (further - reach) * token_bytes
        moving_s = tiers.latency_s[place] + tiers.per_byte_s[place] * span_bytes
        spent_s = spent_s + np.where(span_bytes > 0.0, moving_s, 0.0)
        cost = spent_s + computing(further)
        better = cost < least * (1.0 + slack) * (1.0 - _GAIN)
        through = np.where(better, place + 1, through)
        best_hit, best_s = np.where(better, further, best_hit), np.where(better, spent_s, best_s)
        least, reach = np.minimum(cost, least), further
    return Taken(through, best_hit, best_s)
