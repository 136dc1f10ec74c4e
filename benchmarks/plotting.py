"""Plots of a benchmark, from the raw results that its parts keep."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.result import raw_folder

# Two axes, and a part's raw results by their keys.
Panel = Callable[[Any, dict[str, Any]], None]


def draw(panels: Mapping[str, Panel], results: Path, quick: bool) -> None:
    """One PNG for each part that has results."""
    raw = raw_folder(results, quick)
    for part, panel in panels.items():
        path = raw / f"{part}.json"
        if not path.exists():
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4))
        panel(axes, json.loads(path.read_text())["results"])
        figure.tight_layout()
        figure.savefig((raw if quick else results) / f"{part}.png", dpi=110)
        plt.close(figure)


def cdf(axes: Axes, seconds: Iterable[float], label: str) -> None:
    """The share of values that are at most so many milliseconds."""
    ordered = sorted(seconds)
    share = [(n + 1) / len(ordered) for n in range(len(ordered))]
    axes.step([1000 * value for value in ordered], share, where="post", label=label)


def style(axes: Axes, title: str, across: str, up: str = "share") -> None:
    """What every plot has."""
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
