"""Plots of `make bench-tiers`, from the raw results that the parts keep."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.plotting import cdf, style
from benchmarks.tiers import vault_restore
from benchmarks.tiers.restore import LABELS
from benchmarks.tiers.stores import NAMES, together


def draw(results: Path, quick: bool) -> None:
    """One PNG for each part that has results."""
    draws = {"restore": _restore, "vault_restore": _vault_restore, "stores": _stores}
    plotting.draw(draws, results, quick)


def _restore(axes: Any, results: dict[str, Any]) -> None:
    def times(prompt: dict[str, Any], what: str) -> list[float]:
        return [visit["ttft_s"] for visit in prompt["visits"][what]]

    _first_tokens(axes, results, LABELS, times)


def _vault_restore(axes: Any, results: dict[str, Any]) -> None:
    _first_tokens(axes, results, vault_restore.LABELS, lambda prompt, what: prompt[what])


def _first_tokens(
    axes: Any,
    results: dict[str, Any],
    labels: Mapping[str, str],
    times: Callable[[dict[str, Any], str], list[float]],
) -> None:
    """Medians over all rounds by prompt length; `times` are a prompt's seconds of one kind."""
    sizes = sorted(map(int, next(iter(results.values()))["prompts"]))
    medians: dict[str, list[float]] = {}
    for what in labels:
        for tokens in sizes:
            prompts = [each["prompts"][str(tokens)] for each in results.values()]
            found = [seconds for prompt in prompts for seconds in times(prompt, what)]
            medians.setdefault(what, []).append(statistics.median(found))
    for what, label in labels.items():
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
