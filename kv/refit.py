"""A cost curve that each observed cost moves: recursive least squares with forgetting.

Seconds are a sum of terms (1, tokens, tokens squared; or 1, bytes), each with a coefficient of at
least 0. What is fitted is the logarithm of seconds, so that twice and half of a prediction weigh
alike, and a long prompt counts no more than a short one. Old samples are forgotten exponentially,
and the covariance is pulled back to where it began (exponential forgetting with resetting, Salgado,
Goodwin and Middleton, Int. J. Control 47, 1988): it never grows beyond that, so that what traffic
has not shown for long neither freezes nor runs away.

A sample that is far off is taken for an outlier and hardly counts. A few of them on one side, with
none on the other, are a new level, which is believed at once: coefficients are scaled to what was
seen since the first of them, and what was known of them is in doubt again. What larger requests
cost is then off by little more than those samples were; and where those were much smaller, they are
taken for what they were: so many seconds more or less, not so many times as dear.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import copysign, exp, isfinite, log
from statistics import median
from typing import NamedTuple

import numpy as np

from kv.errors import CurveError
from kv.scales import scales_of

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]

# Of what was learned each sample leaves so much: about 20 samples are remembered.
FORGETTING = 0.95
# Logarithm of actual over predicted beyond which a sample is an outlier, and as what it counts.
SURPRISE, HEARD = log(1.5), 0.2
# So many outliers to one side among so many samples are a new level.
SHIFT_AFTER, AMONG = 3, 6

# Standard deviation at the start, and at most: of a term's share in a typical request's cost, over
# that share and beside it. Variance of the logarithm of one sample, for a spread of 20 %.
_OF_SHARE, _BESIDE, _NOISE_VARIANCE = 0.4, 0.03, 0.04
# A sample is taken to be off by at most so much; one of less than a nanosecond measured nothing. A
# request that costs a thousandth of a typical one says all that smaller ones could.
_MOST_OFF, _LEAST_S, _STEEPEST = log(1e6), 1e-9, 1e3
# A new level changes a typical request by at most so many times the seconds that samples were off:
# those of half its cost and more tell of it as of themselves; and by a ratio whose logarithm is so
# many times theirs. Of the constant's share it leaves so much.
_TELLS, _BEYOND, _LEFT = 2.0, 1.25, 0.1


class Seen(NamedTuple):
    """A sample: its terms over those of a typical request, the logarithm of its seconds over a
    typical request's, and that over what was predicted, 0 if it is no outlier."""

    shares: Vector
    cost: float
    surprise: float

    @property
    def predicted(self) -> float:
        """What an outlier was predicted to take, over a typical request's seconds."""
        return exp(self.cost - self.surprise)

    @property
    def more(self) -> float:
        """What it took beyond that."""
        return exp(self.cost) - self.predicted


@dataclass(frozen=True, slots=True)
class Fit:
    """What is known of one curve.

    `weights` are what each term costs a typical request, over its `typical_s`; `covariance` is
    theirs, over their `spreads`. `recent` are the last samples; `shifts` counts new levels.
    """

    terms: Vector
    typical_s: float
    weights: Vector
    spreads: Vector
    covariance: Matrix
    recent: tuple[Seen, ...] = ()
    shifts: int = 0

    def coefficients(self) -> Vector:
        """Seconds of one unit of each term."""
        pairs = zip(self.weights, self.terms, strict=True)
        return tuple(weight * self.typical_s / term for weight, term in pairs)

    def seconds(self, terms: Sequence[float]) -> float:
        """What a request of these terms costs."""
        return sum(c * term for c, term in zip(self.coefficients(), terms, strict=True))


def begin(coefficients: Sequence[float], typical: Sequence[float]) -> Fit:
    """A fit that predicts as these coefficients do; `typical` are the terms of a request by which
    it is known what is much.

    Raises CurveError for coefficients below 0, and where that request has a term of nothing or
    costs nothing.
    """
    parts = [c * term for c, term in zip(coefficients, typical, strict=True)]
    seconds = sum(parts)
    fits = isfinite(seconds) and seconds > 0.0 and min(parts) >= 0.0
    if not (fits and all(term > 0.0 for term in typical)):
        given = f"coefficients {tuple(coefficients)} of a request {tuple(typical)}"
        raise CurveError("fit", given, "give one that costs something")
    weights = tuple(part / seconds for part in parts)
    spreads = tuple(_OF_SHARE * weight + _BESIDE for weight in weights)
    size = range(len(parts))
    start = tuple(tuple(float(i == j) for j in size) for i in size)
    return Fit(tuple(typical), seconds, weights, spreads, start)


def observe(fit: Fit, terms: Sequence[float], seconds: float, patience: int = SHIFT_AFTER) -> Fit:
    """The fit behind one sample; `patience` outliers to one side are a new level. A sample that
    took no time, or was predicted to, changes nothing."""
    shares = tuple(term / typical for term, typical in zip(terms, fit.terms, strict=True))
    predicted = sum(w * share for w, share in zip(fit.weights, shares, strict=True))
    measured = isfinite(seconds) and seconds >= _LEAST_S
    if not (measured and fit.typical_s * predicted >= _LEAST_S):
        return fit
    cost = log(seconds) - log(fit.typical_s)
    off = max(-_MOST_OFF, min(_MOST_OFF, cost - log(predicted)))
    seen = Seen(shares, log(predicted) + off, off if abs(off) > SURPRISE else 0.0)
    fit = replace(fit, recent=(*fit.recent, seen)[-AMONG:])
    if seen.surprise and _is_level(fit.recent, patience):
        return _shifted(fit)
    heard = off if not seen.surprise else HEARD if off > 0.0 else -HEARD
    weights, covariance = _moved(fit, [share / predicted for share in shares], heard)
    return replace(fit, weights=weights, covariance=covariance)


def _is_level(recent: Sequence[Seen], patience: int) -> bool:
    beyond = [seen.surprise for seen in recent if seen.surprise]
    return len(beyond) >= patience and (min(beyond) > 0.0 or max(beyond) < 0.0)


def _shifted(fit: Fit) -> Fit:
    """Coefficients scaled to the samples since the first outlier."""
    first = next(at for at, seen in enumerate(fit.recent) if seen.surprise)
    outliers = [seen for seen in fit.recent if seen.surprise]
    level = median(seen.surprise for seen in outliers)
    largest = max(outliers, key=lambda seen: seen.predicted)
    parts = np.array([seen.shares for seen in fit.recent[first:]]) * np.array(fit.weights)
    costs = np.array([seen.cost for seen in fit.recent[first:]])
    again = _scaled(fit, scales_of(parts, costs, level))
    if _overreaches(fit, again, largest):
        again = _nearer(fit, level)
    return replace(again, shifts=fit.shifts + 1)


def _scaled(fit: Fit, scales: Iterable[float]) -> Fit:
    pairs = zip(fit.coefficients(), scales, strict=True)
    return begin([c * exp(scale) for c, scale in pairs], fit.terms)


def _overreaches(fit: Fit, again: Fit, largest: Seen) -> bool:
    """Whether a typical request would become dearer, or cheaper, by a much greater ratio than the
    largest outlier was off by, or by many more seconds; or cheaper where that was dearer, or the
    reverse. Small ones show little of what large ones cost: the noise of a few may look like a term
    that is tens of times as dear, or as cheap."""
    before_s = fit.seconds(fit.terms)
    ratio = copysign(1.0, largest.surprise) * log(again.typical_s / before_s)
    if not 0.0 <= ratio <= _BEYOND * abs(largest.surprise):
        return True
    return abs(again.typical_s - before_s) > _TELLS * abs(largest.more) * fit.typical_s


def _nearer(fit: Fit, level: float) -> Fit:
    """Of two ways to account for what samples were off by, that which changes a typical request
    less: all terms by as many times, or the constant by as many seconds."""
    before_s = fit.seconds(fit.terms)
    ways = _scaled(fit, [level] * len(fit.weights)), _constant(fit)
    return min(ways, key=lambda each: abs(log(each.typical_s / before_s)))


def _constant(fit: Fit) -> Fit:
    """With the constant changed by what the middle sample was off; what that cannot account for
    scales all other terms."""
    outliers = sorted((seen for seen in fit.recent if seen.surprise), key=lambda seen: seen.more)
    middle, constant = outliers[len(outliers) // 2], fit.weights[0]
    took, others = exp(middle.cost), middle.predicted - constant
    first, rest = constant + middle.more, 1.0
    least = _LEFT * constant / middle.predicted * took
    if first < least:
        first, rest = least, (took - least) / others
    coefficients = [c * rest for c in fit.coefficients()]
    coefficients[0] = first * fit.typical_s / fit.terms[0]
    return begin(coefficients, fit.terms)


def _moved(fit: Fit, slopes: Sequence[float], off: float) -> tuple[Vector, Matrix]:
    """One step of least squares: weights of at least 0, and the covariance between its bounds.

    With P the covariance over the spreads, s the slopes by them, and r = 1/FORGETTING - 1, the next
    one is (1 + r) P - P s s'P / (noise + s'P s) - r P P. It stays between 0 and 1: the second term
    is at most P, and r P (1 - P) is 0 at both.
    """
    before, size = fit.covariance, range(len(slopes))
    slopes = [min(_STEEPEST, s * spread) for s, spread in zip(slopes, fit.spreads, strict=True)]
    gained = [sum(before[i][j] * slopes[j] for j in size) for i in size]
    whole = _NOISE_VARIANCE + sum(slopes[i] * gained[i] for i in size)
    moves = (spread * gain / whole * off for spread, gain in zip(fit.spreads, gained, strict=True))
    weights = tuple(max(0.0, w + move) for w, move in zip(fit.weights, moves, strict=True))
    if not any(weights):  # less than nothing: it keeps what it had until a new level shows
        weights = fit.weights
    squared = [[sum(before[i][k] * before[k][j] for k in size) for j in size] for i in size]
    forgotten = 1.0 / FORGETTING - 1.0
    covariance = tuple(
        tuple(
            (1.0 + forgotten) * before[i][j]
            - gained[i] * gained[j] / whole
            - forgotten * squared[i][j]
            for j in size
        )
        for i in size
    )
    return weights, covariance
