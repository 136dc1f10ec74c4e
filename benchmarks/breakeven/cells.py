"""What the grid's samples say: each cell's medians, where the crossovers lie, and the rows.

A cell is a link, a codec, a cached prefix and a suffix. A series is the cells that differ by their
prefix alone: along it there may be a crossover, from which on fetching is quicker than computing.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import exp, inf, log

from benchmarks.result import Row, at_most, quantile

COMPUTE, FETCH, OURS = "always_compute", "always_fetch", "breakeven"
POLICIES = (COMPUTE, FETCH, OURS)
# Further from a crossover than this factor, one of the two is plainly better.
NEAR = 2.0
# Of prefixes that double, one lies within this factor of any crossover between them.
AT = 2.0**0.5
# A link, a codec, a suffix, a prefix.
Key = tuple[str, str, int, int]
# A miss of so little is no miss: issue 5, "Speed".
SLACK_S, SLACK_RATIO = 0.03, 1.15


@dataclass(frozen=True, slots=True)
class Cell:
    """Seconds to the first token by policy, and predicted ones beside actual ones of ours."""

    link: str
    codec: str
    prefix_tokens: int
    suffix_tokens: int
    ttft_s: Mapping[str, Sequence[float]]
    predicted_s: Sequence[tuple[float, float]] = ()

    @property
    def key(self) -> "Key":
        """Which cell it is."""
        return self.link, self.codec, self.suffix_tokens, self.prefix_tokens

    def median_s(self, policy: str) -> float:
        return statistics.median(self.ttft_s[policy])

    @property
    def better_s(self) -> float:
        """The better of computing and fetching."""
        return min(self.median_s(COMPUTE), self.median_s(FETCH))

    @property
    def ratio(self) -> float:
        """Ours against the better of both."""
        return self.median_s(OURS) / self.better_s


def series(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Cells that differ by their prefix, shortest first."""

    ordered = sorted(cells, key=lambda cell: cell.key)
    for _, alike in groupby(ordered, lambda cell: cell.key[:-1]):
        yield list(alike)


def crossover_tokens(along: Sequence[Cell]) -> float | None:
    """The prefix at which fetching takes as long as computing, between the two cells where the
    quicker one changes; None where it does not. Both axes are taken as logarithms."""
    gains = [log(cell.median_s(COMPUTE) / cell.median_s(FETCH)) for cell in along]
    for (left, right), (here, there) in zip(pairwise(along), pairwise(gains), strict=True):
        if here * there < 0.0:
            share = here / (here - there)
            return float(left.prefix_tokens ** (1.0 - share) * right.prefix_tokens**share)
    return None


def near_crossover(cells: Sequence[Cell], factor: float) -> list[Cell]:
    """Cells whose prefix is within this factor of their series' crossover."""
    found = []
    for along in series(cells):
        at = crossover_tokens(along)
        if at is not None:
            found += [c for c in along if max(c.prefix_tokens / at, at / c.prefix_tokens) <= factor]
    return found


def tuned(cells: Sequence[Cell]) -> dict[Key, float]:
    """What each cell would take by a static threshold, the best one for its link and codec: from so
    many cached tokens on all is fetched, below all is computed."""
    taken: dict[Key, float] = {}
    for pair in {(cell.link, cell.codec) for cell in cells}:
        alike = [cell for cell in cells if (cell.link, cell.codec) == pair]
        tries = [0.0, inf, *(float(cell.prefix_tokens) for cell in alike)]
        best = min(tries, key=lambda least: _mean(_by_threshold(c, least) for c in alike))
        taken |= {cell.key: _by_threshold(cell, best) for cell in alike}
    return taken


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Every figure that issue 5 asks of the grid; those of a crossover only where there is one."""
    threshold_s = tuned(cells)
    found = [
        at_most("ours_to_better", _mean(c.ratio for c in cells), "x", 1.0, f"{len(cells)} cells"),
        _worst(cells),
    ]
    near, at = near_crossover(cells, NEAR), near_crossover(cells, AT)

    def against(name: str, some: Sequence[Cell], target: float, to: Callable[[Cell], float]) -> Row:
        mean = _mean(cell.median_s(OURS) / to(cell) for cell in some)
        return at_most(name, mean, "x", target, f"geometric mean of {len(some)} cells")

    if at:
        found.append(against("ours_to_better_at_crossover", at, 0.6, lambda c: c.better_s))
        found.append(against("ours_to_better_near_crossover", near, 0.75, lambda c: c.better_s))
    found.append(against("ours_to_threshold", cells, 0.95, lambda c: threshold_s[c.key]))
    if near:
        found.append(
            against("ours_to_threshold_near_crossover", near, 0.8, lambda c: threshold_s[c.key])
        )
    pairs = [pair for cell in cells for pair in cell.predicted_s]
    return [*found, *predictions(pairs, "plans of ours, against the first token at the ingress")]


def _worst(cells: Sequence[Cell]) -> Row:
    """The worst ratio among cells that miss by more than the slack; else the worst that is left."""

    def missed(cell: Cell) -> float:
        late = cell.median_s(OURS) - cell.better_s > SLACK_S
        return cell.ratio if late else min(cell.ratio, SLACK_RATIO)

    worst = max(cells, key=missed)
    where = f"{worst.link}, {worst.codec}, {worst.prefix_tokens}+{worst.suffix_tokens} tokens"
    return at_most("ours_to_better_worst", missed(worst), "x", SLACK_RATIO, where)


def predictions(pairs: Iterable[tuple[float, float]], of: str) -> list[Row]:
    """How far off predictions were, of pairs of predicted and actual seconds; no rows for none."""
    errors = [100 * abs(said_s - took_s) / took_s for said_s, took_s in pairs if took_s > 0.0]
    if not errors:
        return []
    detail = f"{len(errors)} {of}"
    median = at_most("prediction_error_median", statistics.median(errors), "%", 15.0, detail)
    return [median, at_most("prediction_error_p90", quantile(errors, 0.9), "%", 35.0, detail)]


def _by_threshold(cell: Cell, least_tokens: float) -> float:
    return cell.median_s(FETCH if cell.prefix_tokens >= least_tokens else COMPUTE)


def _mean(values: Iterable[float]) -> float:
    """Geometric."""
    return exp(statistics.fmean(log(value) for value in values))
