"""The anchor's picture: load figures of the three systems, and what a killed prefill costs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_load import median
from anchor_rows import TITLES

COLORS = {"ours": "#1b7f5c", "documented": "#c2793a", "tuned": "#6b7fb3"}
PANELS = (
    ("ttft_p50_s", "TTFT p50 (s)"),
    ("itl_p50_s", "ITL p50 (s)"),
    ("tokens_per_s", "throughput (tokens/s)"),
)
KILL = (
    ("first_new_answer_s", "first answer to\na new request"),
    ("prefill_back_s", "prefill\nworks again"),
)


def plot(turns: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars are medians of the turns, whiskers their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4.2))
    shapes = next((list(turn["loads"]) for turn in turns if "loads" in turn), [])
    for axis, (key, title) in zip(axes, PANELS, strict=False):
        labels = [
            shape.replace(", ", ",\n").replace("-token prompts", " tokens") for shape in shapes
        ]
        _bars(axis, labels, {n: [_loads(turns, n, s, key) for s in shapes] for n in TITLES})
        axis.set_title(title)
    kills = {n: [_kills(turns, n, key) for key, _ in KILL] for n in TITLES}
    _bars(axes[3], [label for _, label in KILL], kills)
    axes[3].set_title("after SIGKILL of the only prefill (s)")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _loads(turns: Sequence[dict[str, Any]], name: str, shape: str, key: str) -> list[float]:
    mine = [t["loads"][shape][key] for t in turns if t["system"] == name and "loads" in t]
    return [value for value in mine if value is not None]


def _kills(turns: Sequence[dict[str, Any]], name: str, key: str) -> list[float]:
    mine = [t["kill"][key] for t in turns if t["system"] == name and "kill" in t]
    return [value for value in mine if value is not None]


def _bars(axis: Any, labels: Sequence[str], groups: dict[str, list[list[float]]]) -> None:
    width = 0.8 / len(groups)
    for place, (name, columns) in enumerate(groups.items()):
        for column, values in enumerate(columns):
            middle = median(values)
            if middle is None:
                continue
            spread = [[middle - min(values)], [max(values) - middle]]
            label = TITLES[name] if column == 0 else None
            at = column + (place - 1) * width
            axis.bar(at, middle, width, yerr=spread, capsize=3, color=COLORS[name], label=label)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text())["raw"], source.with_suffix(".png"))
