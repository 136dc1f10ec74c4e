"""Plots of `make bench-serve`, from the raw results that the parts keep."""

from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.plotting import cdf, style


def draw(results: Path, quick: bool) -> None:
    """One PNG for each part that has results."""
    panels = {
        "overhead": _overhead,
        "interference": _interference,
        "conversations": _conversations,
    }
    plotting.draw(panels, results, quick)


def _overhead(axes: Any, results: dict[str, Any]) -> None:
    for name in ("plain", "ours"):
        blocks = [done for key, done in results.items() if key.startswith(f"{name}-")]
        for panel, what in zip(axes, ("ttft_s", "itl_s"), strict=True):
            values = [value for block in blocks for value in block["alone"][what]]
            if values:
                cdf(panel, values, name)
    style(axes[0], "Cached prompts of 200 tokens, one at a time", "TTFT, ms")
    style(axes[1], "The same", "between tokens, mean of an answer, ms")


def _interference(axes: Any, results: dict[str, Any]) -> None:
    for key, done in results.items():
        names = {"ours-0": "ours", "base-0": "colocated, its best"}
        if key.startswith("search-"):
            names[key] = f"colocated, chunk {key.removeprefix('search-')}"
        if key not in names:
            continue
        label = names[key]
        gaps = sorted(gap for stream in done["gaps_s"] for gap in stream)
        beyond = [1 - n / len(gaps) for n in range(len(gaps))]
        axes[0].step([1000 * gap for gap in gaps], beyond, where="post", label=label)
        cdf(axes[1], done["prompts"]["ttft_s"], label)
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    style(axes[0], "Streams while 2k prompts arrive", "between tokens, ms", "share of gaps beyond")
    style(axes[1], "The prompts", "TTFT, ms")


def _conversations(axes: Any, results: dict[str, Any]) -> None:
    policies = sorted({key.rsplit("-", 1)[0] for key in results})
    for policy in policies:
        runs = [done for key, done in results.items() if key.rsplit("-", 1)[0] == policy]
        turns = [turn for done in runs for turn in done["turns"]]
        cdf(axes[0], [turn["ttft_s"] for turn in turns], policy)
        numbers = sorted({turn["turn"] for turn in turns})
        means = [
            sum(of_turn) / len(of_turn)
            for number in numbers
            if (of_turn := [turn["ttft_s"] for turn in turns if turn["turn"] == number])
        ]
        axes[1].plot([number + 1 for number in numbers], means, marker="o", label=policy)
    style(axes[0], "Turns of four conversations on two engines", "TTFT, ms")
    style(axes[1], "Mean TTFT by turn", "turn", "s")
