"""How good predictions were: `python -m benchmarks.calibration AUDIT --plot OUT.png`.

AUDIT is a file or a folder of the audit (docs/audit.md). Requests that were planned anew, had no
first token or no prediction say nothing of a curve and are left out, and so are batch requests,
which give way to others for as long as those are there.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from kv.audit import BadLine, Entry, read
from kv.parts import Action, Part
from router.rotation import lines_of, newest_first

ALL = "all"


@dataclass(frozen=True, slots=True)
class Point:
    """A predicted and an actual time, in seconds, both above 0."""

    predicted_s: float
    actual_s: float

    @property
    def error(self) -> float:
        """|actual - predicted| / actual."""
        return abs(self.actual_s - self.predicted_s) / self.actual_s

    @property
    def ratio(self) -> float:
        """Actual over predicted: above 1 where it took longer."""
        return self.actual_s / self.predicted_s


def first_tokens(entries: Iterable[Entry]) -> dict[str, list[Point]]:
    """Predicted and actual TTFT by shape, and of all."""
    points: dict[str, list[Point]] = defaultdict(list)
    for entry in entries:
        if entry.error_ratio and entry.ttft_s is not None:
            point = Point(entry.plan.predicted_ttft_s, entry.ttft_s)
            points[entry.plan.shape].append(point)
            points[ALL].append(point)
    return dict(points)


def parts(entries: Iterable[Entry]) -> dict[str, list[Point]]:
    """Predicted and actual seconds of each part that has both. A handoff's are with its first step,
    as a link's curve has them."""
    points: dict[str, list[Point]] = defaultdict(list)
    for entry in entries:
        if entry.error_ratio is None:
            continue
        actual = _seconds(entry.parts)
        for place, predicted_s in _seconds(entry.plan.parts).items():
            if predicted_s > 0.0 and actual.get(place, 0.0) > 0.0:
                points[place[0]].append(Point(predicted_s, actual[place]))
    return dict(points)


def _seconds(found: Iterable[Part]) -> Mapping[tuple[Action, str], float]:
    seconds: dict[tuple[Action, str], float] = defaultdict(float)
    for part in found:
        action = Action.HANDOFF if part.action is Action.STEP else part.action
        seconds[action, part.replica] += part.seconds
    return seconds


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of at least one value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def table(points: Mapping[str, Sequence[Point]]) -> list[str]:
    """A line for each group: how many, how far off, and which way."""
    rows = [f"{'':<14}{'requests':>9}{'median |error|':>16}{'p90':>8}{'median ratio':>14}"]
    for name, group in points.items():
        errors, ratios = [p.error for p in group], [p.ratio for p in group]
        median, p90, ratio = quantile(errors, 0.5), quantile(errors, 0.9), quantile(ratios, 0.5)
        rows.append(f"{name:<14}{len(group):>9}{median:>16.1%}{p90:>8.1%}{ratio:>14.2f}")
    return rows


def draw(points: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Left each request, predicted against actual; right which share is off by how much."""
    from benchmarks.plotting import plt, style

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    shapes = {name: group for name, group in points.items() if name != ALL}
    for name, group in shapes.items():
        left.scatter([p.predicted_s for p in group], [p.actual_s for p in group], s=9, label=name)
        ratios = sorted(p.ratio for p in group)
        share = [(n + 1) / len(ratios) for n in range(len(ratios))]
        right.step(ratios, share, where="post", label=name)
    seconds = [at for group in shapes.values() for p in group for at in (p.predicted_s, p.actual_s)]
    ends = [min(seconds), max(seconds)]
    for factor, dashes in ((1.0, "-"), (2.0, ":"), (0.5, ":")):
        left.plot(ends, [factor * end for end in ends], dashes, color="grey", linewidth=0.8)
    left.set_xscale("log")
    left.set_yscale("log")
    right.set_xscale("log")
    right.axvline(1.0, color="grey", linewidth=0.8)
    style(left, "Time to first token", "predicted, s", "actual, s")
    style(right, "How far off", "actual / predicted", "share of requests")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def load(place: Path) -> list[Entry]:
    """All entries of a file or folder, from the oldest; bad lines are told on stderr."""
    entries: list[Entry] = []
    for path in reversed(newest_first(place)):

        def tell(bad: BadLine, path: Path = path) -> None:
            print(f"{path}, line {bad.number}: {bad.complaint}", file=sys.stderr)

        entries += read(lines_of(path), tell)
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description="How good predictions were."
    )
    parser.add_argument("audit", type=Path, metavar="AUDIT", help="an audit's file or folder")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw a picture")
    arguments = parser.parse_args(argv)
    try:
        entries = load(arguments.audit)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    points = first_tokens(entries)
    if not points:
        print(f"error: none of {len(entries)} requests has a prediction to judge", file=sys.stderr)
        return 1
    print("\n".join(table(points)))
    by_part = parts(entries)
    if by_part:
        print("\n" + "\n".join(table(by_part)))
    if arguments.plot is not None:
        draw(points, arguments.plot)
        print(f"\ndrawn to {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
