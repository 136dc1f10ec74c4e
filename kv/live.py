"""Curves that stay true: what was measured at the start, then what requests told.

A curve that turned out worse than it once was keeps away the requests that would show that it is
good again. So while nobody uses it, it is told as better and better, until it is tried; then a
single good sample is believed. Each trial that only confirms it doubles the time to the next. With
a `retry_s` of None nothing is tried again. Its best is what requests bore out that were not small:
how fast a small one was says little of large ones, however dear the constant is that both pay.
"""

from collections import deque
from collections.abc import Sequence
from math import inf

from kv.curve import LinkCurve, PrefillCurve, PrefillSample, TransferSample
from kv.refit import SHIFT_AFTER, Vector, begin, observe

# What is known to be worse than it was is half forgotten after so long, at first and at most.
RETRY_S, MOST_RETRY_S = 5.0, 600.0
# So many times as much as at its best is worse. Where what is seen stays above that, each sample
# that is no trial makes the best worse, by so much of itself at most.
WORSE, RELAX = 1.5, 0.01
# A request that costs less of a typical one, the constant left out, is small.
SMALL = 0.25
# Samples that are kept to be shown.
KEPT = 64
# A long prompt, by which it is known what is much.
TYPICAL_TOKENS = 1024

Point = tuple[tuple[float, ...], float]


class _Live:
    """One curve by its terms. Times are seconds of any one clock."""

    def __init__(
        self,
        coefficients: Sequence[float],
        typical: Sequence[float],
        retry_s: float | None,
    ) -> None:
        self._fit = begin(coefficients, typical)
        self._best = tuple(coefficients)
        self._best_s = self._fit.typical_s
        self._first_retry_s = inf if retry_s is None else retry_s
        self._seen_at_s, self._told_at_s = 0.0, 0.0
        self._retry_s = self._first_retry_s
        # `borne_out` are those that were not small, and as was known by then.
        self.samples, self.borne_out = 0, 0
        self.points: deque[Point] = deque(maxlen=KEPT)

    @property
    def shifts(self) -> int:
        """How often it was found at a new level."""
        return self._fit.shifts

    @property
    def fades(self) -> bool:
        """Whether what is told of it changes while nothing is seen."""
        return self._retry_s < inf and self._fit.seconds(self._fit.terms) > WORSE * self._best_s

    def _saw(self, terms: Vector, seconds: float, now_s: float) -> bool:
        """Learn from one request; whether it bears out what is known of a typical one."""
        before, fit = self._fit, self._fit
        tells, weighs = self._tells(terms), fit.seconds(terms) >= SMALL * fit.seconds(fit.terms)
        since_s = self._told_at_s if tells else self._seen_at_s
        rested = weighs and self.samples > 0 and now_s - since_s > self._retry_s
        trial, believed = rested and self.fades, rested and seconds < fit.seconds(terms)
        self._fit = fit = observe(fit, terms, seconds, 1 if believed else SHIFT_AFTER)
        self.samples += 1
        self.points.append((terms, seconds))
        if fit.shifts != before.shifts:
            self._retry_s = self._first_retry_s
        elif trial:
            self._retry_s = max(self._first_retry_s, min(MOST_RETRY_S, 2.0 * self._retry_s))
        self._seen_at_s = now_s
        self._told_at_s = now_s if tells else self._told_at_s
        known_s = self._fit.seconds(terms)
        borne_out = tells and known_s < WORSE * seconds and seconds < WORSE * known_s
        if borne_out:
            self.borne_out += 1
            self._compare(trial)
        return borne_out

    def _tells(self, terms: Vector) -> bool:
        """Whether a request is not small. The constant is left out: where it is most of what a
        typical one costs, a request of five tokens costs as much and tells nothing of it."""
        fit = self._fit
        constant = fit.coefficients()[0]
        typical_s = fit.seconds(fit.terms) - constant * fit.terms[0]
        return fit.seconds(terms) - constant * terms[0] >= SMALL * typical_s

    def _compare(self, trial: bool) -> None:
        """What is known with what it was at its best."""
        fit, typical_s = self._fit, self._fit.seconds(self._fit.terms)
        nearer = 1.0
        if typical_s > self._best_s:
            nearer = 0.0 if trial else RELAX * self._best_s / typical_s
        both = zip(self._best, fit.coefficients(), strict=True)
        self._best = tuple(best + (now - best) * nearer for best, now in both)
        self._best_s += (typical_s - self._best_s) * nearer

    def _told(self, now_s: float) -> Vector:
        """Coefficients, to two digits: plans are priced anew whenever they change. A small request
        shows what any costs, the constant, and nothing else."""
        known = self._fit.coefficients()
        constant, others = self._left(self._seen_at_s, now_s), self._left(self._told_at_s, now_s)
        left = (constant, *(others for _ in known[1:]))
        each = zip(self._best, known, left, strict=True)
        return tuple(float(f"{best + (now - best) * part:.1e}") for best, now, part in each)

    def _left(self, at_s: float, now_s: float) -> float:
        """Of what was known at a time."""
        return 0.5 ** (max(0.0, now_s - at_s) / self._retry_s) if self.fades else 1.0


class LivePrefill(_Live):
    """What prefilling costs one replica. Raises CurveError for a curve that costs nothing."""

    def __init__(self, measured: PrefillCurve, retry_s: float | None = RETRY_S) -> None:
        coefficients = (measured.base_s, measured.per_token_s, measured.per_token2_s)
        typical = _prefill_terms(TYPICAL_TOKENS, 0)
        super().__init__(coefficients, typical, retry_s=retry_s)

    def saw(self, sample: PrefillSample, now_s: float) -> bool:
        """One prefill took so long; whether it bears out what is known of long ones."""
        terms = _prefill_terms(sample.new_tokens, sample.cached_tokens)
        return self._saw(terms, sample.seconds, now_s)

    def seen(self) -> list[tuple[int, int, float]]:
        """The last samples: new tokens, cached ones, seconds."""
        return [
            (int(new), round((new2 / new - new) / 2.0), seconds)
            for (_, new, new2), seconds in self.points
        ]

    def curve(self, now_s: float) -> PrefillCurve:
        """What it costs now."""
        return PrefillCurve(*self._told(now_s))


class LiveLink(_Live):
    """What moving bytes over one link costs; `typical_bytes` are many. Raises CurveError for a
    curve that costs nothing."""

    def __init__(
        self, measured: LinkCurve, typical_bytes: int, retry_s: float | None = RETRY_S
    ) -> None:
        coefficients = (measured.latency_s, measured.per_byte_s)
        typical = (1.0, float(typical_bytes))
        super().__init__(coefficients, typical, retry_s=retry_s)

    def saw(self, sample: TransferSample, now_s: float) -> None:
        """One transfer took so long."""
        self._saw((1.0, float(sample.n_bytes)), sample.seconds, now_s)

    def seen(self) -> list[tuple[int, float]]:
        """The last samples: bytes, seconds."""
        return [(int(n_bytes), seconds) for (_, n_bytes), seconds in self.points]

    def curve(self, now_s: float) -> LinkCurve:
        """What it costs now."""
        return LinkCurve(*self._told(now_s))


def _prefill_terms(new_tokens: int, cached_tokens: int) -> Vector:
    # n^2 - h^2 with n = h + new
    return (1.0, float(new_tokens), float(new_tokens * (new_tokens + 2 * cached_tokens)))
