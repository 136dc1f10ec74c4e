"""Plots of `make bench-tiers`, from the raw results that the parts keep."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.plotting import cdf, style
from benchmarks.tiers.restore import LABELS
from benchmarks.tiers.stores import NAMES, together


def draw(results: Path, quick: bool) -> None:
    """One PNG for each part that has results."""
    plotting.draw({"restore": _restore, "stores": _stores}, results, quick)


def _restore(axes: Any, results: dict[str, Any]) -> None:
    sizes = sorted(map(int, next(iter(results.values()))["prompts"]))
    medians: dict[str, list[float]] = {}
    for what in LABELS:
        for tokens in sizes:
            of_rounds = [each["prompts"][str(tokens)]["visits"][what] for each in results.values()]
            times = [visit["ttft_s"] for visits in of_rounds for visit in visits]
            medians.setdefault(what, []).append(statistics.median(times))
    for what, label in LABELS.items():
        axes[0].plot(sizes, medians[what], marker="o", label=label)
        if what != "cold":
            ratios = [a / b for a, b in zip(medians[what], medians["hit"], strict=True)]
            axes[1].plot(sizes, ratios, marker="o", label=label)
    axes[0].set_yscale("log")
    style(axes[0], "First token of a prompt", "tokens", "s")
    style(axes[1], "Against a device hit", "tokens", "x")


def _stores(axes: Any, results: dict[str, Any]) -> None:
    for name in NAMES:
        turns = [done for key, done in results.items() if key.startswith(f"{name}-")]
        cdf(axes[0], [gap for turn in turns for gap in together(turn["at_s"])], f"tiers {name}")
        began = [max(times[0] for times in turn["at_s"]) for turn in turns]
        axes[1].plot(range(1, len(began) + 1), began, marker="o", label=f"tiers {name}")
    style(axes[0], "Between tokens of running streams", "ms")
    style(axes[1], "Until every stream has begun", "turn", "s")
