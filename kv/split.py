"""Where a prompt is split between a replica that computes its head and one that fetches its tail.

Both sides work at once, so what counts is the slower one. Seconds until the first m tokens are in
are a parabola in m that rises, seconds until the rest is in a line that falls; what the compute of
the head is charged for on top is a parabola too. The sum of the greater of the two and that charge
is convex in m: its least value on block boundaries lies beside its least value of all, which is
where both sides take as long; or sooner, where the charge outgrows what fetching less would save;
or later, where it is less than that for what is fetched instead.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# In place of a slope of 0, which nothing crosses.
_FLAT = 1e-300


class Sides(NamedTuple):
    """What a split at m tokens costs; arrays of shapes that broadcast.

    The head is in after `head_s + head_per_token_s * m + head_per_token2_s * m^2` seconds, the tail
    after `tail_s - tail_per_token_s * m`. A head that is longer by m is charged another
    `price_per_token_s * m + price_per_token2_s * m^2`, less what is charged for fetching those. No
    coefficient but `head_s`, `tail_s` and `price_per_token_s` is below 0.
    """

    head_s: Floats
    head_per_token_s: Floats
    head_per_token2_s: Floats
    tail_s: Floats
    tail_per_token_s: Floats
    price_per_token_s: Floats
    price_per_token2_s: Floats

    def head(self, tokens: Floats) -> Floats:
        """Seconds until the first `tokens` are in."""
        rate: Floats = self.head_per_token_s + self.head_per_token2_s * tokens
        return self.head_s + rate * tokens

    def tail(self, tokens: Floats) -> Floats:
        """Seconds until those behind the first `tokens` are in."""
        return self.tail_s - self.tail_per_token_s * tokens

    def cost(self, tokens: Floats) -> Floats:
        """What is least at the best split."""
        price: Floats = self.price_per_token_s + self.price_per_token2_s * tokens
        return np.maximum(self.head(tokens), self.tail(tokens)) + price * tokens


def best_split(sides: Sides, low: Floats, high: Floats, block_tokens: int) -> Floats:
    """The split of the least cost among block boundaries from `low` to `high`, which are some; the
    earlier of two that cost the same. It means nothing where `high` is below `low`."""
    meets = np.minimum(_meets(sides), _turns(sides))
    if (sides.price_per_token_s < 0.0).any():
        meets = np.maximum(meets, _returns(sides))
    # Below the first boundary the first is the best; the last likewise.
    meets = np.minimum(np.maximum(meets, low), high)
    before = np.floor(meets / block_tokens) * block_tokens
    behind = np.minimum(before + block_tokens, high)
    return np.where(sides.cost(behind) < sides.cost(before), behind, before)


def _meets(sides: Sides) -> Floats:
    """Where both sides take as long."""
    slope = sides.head_per_token_s + sides.tail_per_token_s
    ahead = sides.tail_s - sides.head_s
    under = np.maximum(slope * slope + 4.0 * sides.head_per_token2_s * ahead, 0.0)
    meets: Floats = 2.0 * ahead / np.maximum(slope + np.sqrt(under), _FLAT)
    return meets


def _turns(sides: Sides) -> Floats:
    """Where the charge for one more token is what fetching one less saves."""
    gain = sides.tail_per_token_s - sides.price_per_token_s
    turns: Floats = gain / np.maximum(2.0 * sides.price_per_token2_s, _FLAT)
    return turns


def _returns(sides: Sides) -> Floats:
    """Where one token more costs the head's side what it saves in charges; below 0 where it never
    saves any."""
    saved = -(sides.head_per_token_s + sides.price_per_token_s)
    bends = sides.head_per_token2_s + sides.price_per_token2_s
    returns: Floats = saved / np.maximum(2.0 * bends, _FLAT)
    return returns
