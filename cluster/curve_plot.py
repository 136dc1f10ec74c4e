"""Pictures of curves: what was measured, what was fitted, and where fetching begins to pay.

matplotlib is no dependency of a cluster; it is loaded when something is drawn.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import PlotError

# Links and tiers that are drawn; a table shows them all.
MOST_LINKS, MOST_TIERS = 11, 24
_COLUMNS, _SHORTEST_TOKENS = 3, 2048


def check(path: Path) -> None:
    """Raise `PlotError` unless a picture could be drawn there."""
    _figure()
    if not path.resolve().parent.is_dir():
        raise PlotError(str(path), f"there is no folder {path.resolve().parent}; make it first")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a report. Raises `PlotError`."""
    try:
        pictured(report).savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise PlotError(str(path), f"not written: {error}") from error


def pictured(report: Mapping[str, Any]) -> Any:
    """A figure with one panel for what computing costs, one for each link, and one for each tier of
    a replica, with a lossy codec's beside it. `report` is what /admin/curves and /admin/replicas
    tell. Raises `PlotError`."""
    links = sorted(report["links"].items())[:MOST_LINKS]
    tiers = [
        (title, name, row)
        for name, each in sorted(report["tiers"].items())
        for title, row in tier_rows({name: each}).items()
    ][:MOST_TIERS]
    rows = -(-(1 + len(links) + len(tiers)) // _COLUMNS)
    figure = _figure()(figsize=(5.5 * _COLUMNS, 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    token_bytes = {row["name"]: row["kv_bytes_per_token"] for row in report["replicas"]}
    _computing(next(panels), report["prefill"])
    received = [(name, name.partition("->")[2], link) for name, link in links]
    for name, receiver, row in (*received, *tiers):
        computing = report["prefill"].get(receiver)
        _link(next(panels), name, row, computing, token_bytes.get(receiver, 0))
    for spare in panels:
        spare.set_axis_off()
    return figure


def tier_rows(tiers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One row for each tier of a replica, and for each that a lossy codec has, by their names."""
    rows = {f"{name}/{tier}": row for name, each in tiers.items() for tier, row in each.items()}
    lossy = {f"{name}/lossy": row["lossy"] for name, row in rows.items() if "lossy" in row}
    return dict(sorted((rows | lossy).items()))


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "`pip install matplotlib`, or in a checkout `make setup-dev`"
        raise PlotError("--plot", f"matplotlib is not installed; {remedy}") from error
    return Figure


def _computing(axes: Any, replicas: Mapping[str, Any]) -> None:
    longest = _SHORTEST_TOKENS
    for name, row in sorted(replicas.items()):
        # Each point as if nothing had been cached, so that all lie about one line.
        points = [
            (new, s * _prefill_s(row, new) / _prefill_s(row, new, c)) for new, c, s in row["points"]
        ]
        longest = max([longest, *(new for new, _ in points)])
        line = _line(axes, name, partial(_prefill_s, row), longest)
        if points:
            axes.scatter(*zip(*points, strict=True), s=12, alpha=0.6, color=line.get_color())
    _style(axes, "computing a prompt")


def _link(
    axes: Any,
    name: str,
    link: Mapping[str, Any],
    computing: Mapping[str, Any] | None,
    token_bytes: int,
) -> None:
    per_token_s = token_bytes / link["bytes_per_s"] if link["bytes_per_s"] else 0.0
    points = [(n_bytes / token_bytes, s) for n_bytes, s in link["points"] if token_bytes]
    crossover = link["crossover_tokens"]
    longest = max([_SHORTEST_TOKENS, 1.5 * (crossover or 0.0), *(tokens for tokens, _ in points)])
    line = _line(axes, "fetching", lambda n: link["latency_s"] + per_token_s * n, longest)
    if points:
        axes.scatter(*zip(*points, strict=True), s=12, alpha=0.6, color=line.get_color())
    if computing is not None:
        _line(axes, "computing", partial(_prefill_s, computing), longest)
    if crossover is not None:
        axes.axvline(crossover, color="gray", linestyle="--", label=f"crossover at {crossover:.0f}")
    _style(axes, name)


def _prefill_s(row: Mapping[str, Any], new: float, cached: float = 0.0) -> float:
    squares = new * (new + 2.0 * cached)
    return float(row["base_s"] + row["per_token_s"] * new + row["per_token2_s"] * squares)


def _line(axes: Any, label: str, seconds: Callable[[float], float], longest: float) -> Any:
    tokens = [longest * step / 100.0 for step in range(101)]
    return axes.plot(tokens, [seconds(n) for n in tokens], label=label)[0]


def _style(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
