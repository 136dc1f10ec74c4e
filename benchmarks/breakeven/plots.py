"""Plots of `make bench-breakeven`, from the raw results that its parts keep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.breakeven import batch_plot, grid, load_plot, seed_plot
from benchmarks.breakeven.cells import COMPUTE, FETCH, OURS, Cell, crossover_tokens, series
from benchmarks.plotting import plt, style
from benchmarks.result import raw_folder

_LABELS = {COMPUTE: "always compute", FETCH: "always fetch", OURS: "ours"}
# A ratio of 1 is white: ours is as quick as the better of both.
_SCALE = {"cmap": "RdYlGn_r", "vmin": 0.5, "vmax": 1.5}


def draw(results: Path, quick: bool) -> None:
    """One PNG for each picture of a part that has results."""
    raw = raw_folder(results, quick)
    into = raw if quick else results
    if cells := grid.cells(quick):
        _heat_map(cells, into / "grid.png")
        _curves(cells, into / "grid-curves.png")
    path = raw / "seed.json"
    if path.exists():
        seed_plot.draw(json.loads(path.read_text())["results"], into)
    panels = {"batch": batch_plot.panel, "load": load_plot.panel}
    plotting.draw(panels, results, quick)


def _heat_map(cells: Sequence[Cell], path: Path) -> None:
    """Ours against the better of computing and fetching: links across, codecs down."""
    links, codecs = (list(dict.fromkeys(getattr(c, f) for c in cells)) for f in ("link", "codec"))
    # A single panel is still as wide as the title.
    size = max(5.5, 2.6 * len(links) + 1.0), 3.2 * len(codecs)
    figure, grid = plt.subplots(len(codecs), len(links), figsize=size, squeeze=False)
    for row, codec in enumerate(codecs):
        for column, link in enumerate(links):
            here = [cell for cell in cells if (cell.link, cell.codec) == (link, codec)]
            _panel(grid[row][column], here)
            grid[row][column].set_title(f"{link}, {codec}", fontsize=9)
    figure.suptitle("TTFT: ours ÷ the better of computing and fetching", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Any, cells: Sequence[Cell]) -> None:
    prefixes, suffixes = (
        sorted({getattr(cell, f"{name}_tokens") for cell in cells}) for name in ("prefix", "suffix")
    )
    known = {(cell.prefix_tokens, cell.suffix_tokens): cell.ratio for cell in cells}
    ratios = [[known.get((p, s), float("nan")) for s in suffixes] for p in prefixes]
    axes.imshow(ratios, aspect="auto", origin="lower", **_SCALE)
    for y, of_prefix in enumerate(ratios):
        for x, ratio in enumerate(of_prefix):
            axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(suffixes)), suffixes, fontsize=7)
    axes.set_yticks(range(len(prefixes)), prefixes, fontsize=7)
    axes.set_xlabel("suffix tokens", fontsize=8)
    axes.set_ylabel("cached prefix tokens", fontsize=8)


def _curves(cells: Sequence[Cell], path: Path) -> None:
    """Seconds against the prefix, for the shortest suffix; a line where fetching begins to win."""
    shortest = min(cell.suffix_tokens for cell in cells)
    several = list(series(cell for cell in cells if cell.suffix_tokens == shortest))
    columns = min(5, -(-len(several) // 2))
    lines = -(-len(several) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3.2 * columns, 3 * lines), squeeze=False)
    for axes, along in zip(grid.flat, several, strict=False):
        for policy, label in _LABELS.items():
            seconds = [cell.median_s(policy) for cell in along]
            axes.plot([cell.prefix_tokens for cell in along], seconds, marker="o", label=label)
        at = crossover_tokens(along)
        if at is not None:
            axes.axvline(at, color="grey", linestyle=":", label="crossover")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yscale("log")
        style(axes, f"{along[0].link}, {along[0].codec}", "cached prefix tokens", "s")
    for axes in grid.flat[len(several) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
