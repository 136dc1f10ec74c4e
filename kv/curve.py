"""What prefilling and moving KV cost: the curves, and their fit to measured samples.

Prefill of the tokens from h to n of a prompt costs base + a*(n - h) + b*(n^2 - h^2); a transfer
costs latency + bytes / bandwidth (DESIGN.md, "The plan"). A fit minimises squared *relative* errors
with no coefficient below zero: 100 tokens count as much as 10,000, and more never costs less.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from kv.errors import CurveError

Floats = NDArray[np.float64]

# Terms tried, simplest first: of two that fit alike the earlier is taken, so that one sample gives
# a rate and two give a rate and a fixed cost. Columns are (base, per token, per token squared).
PREFILL_TERMS = ((1,), (0, 1), (1, 2), (0, 1, 2), (2,), (0, 2), (0,))
LINK_TERMS = ((1,), (0, 1), (0,))
# Sums of squared relative errors closer than this are a tie: one sample off by a millionth.
TIE = 1e-12
# Columns of unit length with a smaller ratio of singular values count as collinear.
COLLINEAR = 1e-9
# No memory moves as much as this: a byte that costs less costs nothing that was measured.
MOST_BYTES_PER_S = 1e13


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """Seconds to prefill on one replica. Raises CurveError unless each cost is finite and >= 0."""

    base_s: float
    per_token_s: float
    per_token2_s: float

    def __post_init__(self) -> None:
        _check_cost("prefill curve", astuple(self))

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds to compute `new_tokens` behind `cached_tokens`; the base alone for none."""
        # n^2 - h^2 with n = h + new
        new_tokens2 = new_tokens * (new_tokens + 2 * cached_tokens)
        return self.base_s + self.per_token_s * new_tokens + self.per_token2_s * new_tokens2


@dataclass(frozen=True, slots=True)
class LinkCurve:
    """Seconds to move bytes over one link. Raises CurveError unless each cost is finite, >= 0."""

    latency_s: float
    per_byte_s: float

    def __post_init__(self) -> None:
        _check_cost("link curve", astuple(self))

    @property
    def bytes_per_s(self) -> float | None:
        """None where bytes cost too little beside the latency to have been measured."""
        measured = self.per_byte_s * MOST_BYTES_PER_S >= 1.0
        return 1.0 / self.per_byte_s if measured else None

    def seconds(self, n_bytes: int) -> float:
        """Seconds to move `n_bytes`; the latency alone for none."""
        return self.latency_s + self.per_byte_s * n_bytes


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """A measured prefill of at least one new token behind some cached ones, in more than 0 s."""

    new_tokens: int
    cached_tokens: int
    seconds: float

    def __post_init__(self) -> None:
        _check_sample("prefill sample", self.new_tokens >= 1 and self.cached_tokens >= 0, self)


@dataclass(frozen=True, slots=True)
class TransferSample:
    """A measured transfer in more than 0 s; one of no bytes measures the latency."""

    n_bytes: int
    seconds: float

    def __post_init__(self) -> None:
        _check_sample("transfer sample", self.n_bytes >= 0, self)


def fit_prefill(samples: Sequence[PrefillSample]) -> PrefillCurve:
    """The prefill curve nearest to `samples`. Raises CurveError without samples."""
    rows = [
        (1.0, s.new_tokens, s.new_tokens * (s.new_tokens + 2.0 * s.cached_tokens)) for s in samples
    ]
    return PrefillCurve(*_fit(rows, [s.seconds for s in samples], PREFILL_TERMS))


def fit_link(samples: Sequence[TransferSample]) -> LinkCurve:
    """The link curve nearest to `samples`. Raises CurveError without samples."""
    rows = [(1.0, s.n_bytes) for s in samples]
    return LinkCurve(*_fit(rows, [s.seconds for s in samples], LINK_TERMS))


def _fit(
    rows: Sequence[tuple[float, ...]],
    seconds: Sequence[float],
    choices: tuple[tuple[int, ...], ...],
) -> list[float]:
    """Non-negative least squares: the optimum is the plain one over some choice of columns."""
    if not rows:
        raise CurveError("fit", "0 samples", "measure at least one, or keep the curve at hand")
    relative = np.array(rows, dtype=np.float64) / np.array(seconds)[:, None]
    best, best_loss = np.zeros(relative.shape[1]), np.inf
    for terms in choices:
        coefficients = _solve(relative, terms)
        loss = float(np.sum((relative @ coefficients - 1.0) ** 2))
        if loss < best_loss - TIE and coefficients.min() >= 0.0:
            best, best_loss = coefficients, loss
    return [float(value) for value in best]


def _solve(relative: Floats, terms: tuple[int, ...]) -> Floats:
    """Least squares over `terms` alone, for a target of ones; zeros where they are collinear."""
    columns = relative[:, terms]
    lengths = np.linalg.norm(columns, axis=0)
    coefficients = np.zeros(relative.shape[1])
    if lengths.all():
        found, _, rank, _ = np.linalg.lstsq(columns / lengths, np.ones(len(columns)), COLLINEAR)
        if rank == len(terms):
            coefficients[list(terms)] = found / lengths
    return coefficients


def _check_cost(subject: str, coefficients: tuple[float, ...]) -> None:
    if not all(isfinite(value) and value >= 0.0 for value in coefficients):
        raise CurveError(subject, f"coefficients {coefficients}", "give finite ones, at least 0")


def _check_sample(subject: str, counted: bool, sample: PrefillSample | TransferSample) -> None:
    if not (counted and isfinite(sample.seconds) and sample.seconds > 0.0):
        raise CurveError(subject, f"{sample}", "leave out what took no time or moved nothing")
