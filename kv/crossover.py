"""From how many tokens on fetching a prefix costs no more than computing it."""

from math import sqrt

from kv.curve import LinkCurve, PrefillCurve


def crossover_tokens(
    computing: PrefillCurve, fetching: LinkCurve, token_bytes: int
) -> float | None:
    """The prefix, in tokens of `token_bytes` of KV, from which on fetching costs no more; 0 where
    it always does, None where no prefix is long enough.

    Computing n tokens costs base + a n + b n^2, fetching them latency + f n. What fetching saves,
    (base - latency) + (a - f) n + b n^2, is a parabola that opens upward: it is at least 0 beyond
    the larger of its roots.
    """
    gain = computing.per_token_s - fetching.per_byte_s * token_bytes
    ahead_s, bend = computing.base_s - fetching.latency_s, computing.per_token2_s
    if bend == 0.0:
        if gain > 0.0:
            return max(0.0, -ahead_s / gain)
        return 0.0 if gain == 0.0 and ahead_s >= 0.0 else None
    square = gain * gain - 4.0 * bend * ahead_s
    if square < 0.0:
        return 0.0
    return max(0.0, (sqrt(square) - gain) / (2.0 * bend))
