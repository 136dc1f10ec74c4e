"""Hysteresis: of plans that cost about the same, one that keeps a prefix where it is.

Predictions are a few per cent off, and loads move all the time, so the cheapest of two near equals
changes from request to request. That does no harm, but where a replica gets a copy of what another
of its pool holds already: the copy pushes other blocks out, and the next like request finds two
holders where one would do. What like requests did last is what the catalogue holds, so nothing else
is remembered, and all ingresses remember the same.
"""

import numpy as np
from numpy.typing import NDArray

from router.columns import Floats


def kept(
    cost_s: Floats, cheapest: int, hit_tokens: Floats, n_decode: int, margin: float, noise: float
) -> int:
    """The cheapest plan among those that cost at most a ratio of `margin` more than the `cheapest`
    and copy at most `noise` tokens more than the least of these.

    `cost_s` is of `local` on each decode replica, then of `remote` on each pair, or without these;
    `hit_tokens` is by replica. A plan copies what a replica of the same pool has and its own has
    not: on D, and where P computes on P too.
    """
    decode, prefill = hit_tokens[:n_decode], hit_tokens[n_decode:]
    most_d, most_p = decode.max(), prefill.max(initial=0.0)
    if cheapest < n_decode:
        copied = most_d - decode[cheapest]
    else:
        d, p = divmod(cheapest - n_decode, prefill.size)
        copied = most_d - decode[d] + most_p - prefill[p]
    if copied <= noise:
        return cheapest
    near = np.flatnonzero(cost_s <= cost_s[cheapest] * (1.0 + margin))
    if near.size == 1:
        return cheapest
    copies = _copied(near - n_decode, most_d - decode, most_p - prefill)
    least = near[copies <= copies.min() + noise]
    return cheapest if cheapest in least else int(least[cost_s[least].argmin()])


def _copied(pairs: NDArray[np.intp], lost_d: Floats, lost_p: Floats) -> Floats:
    """Tokens; `pairs` counts from the first pair, `local` plans are below 0."""
    n_prefill = lost_p.size
    if not n_prefill:
        return lost_d[pairs]
    local = pairs < 0
    # From the end, `local` plans are at their decode replicas as well.
    on_d = np.where(local, pairs, pairs // n_prefill)
    copied: Floats = lost_d[on_d] + np.where(local, 0.0, lost_p[pairs % n_prefill])
    return copied
