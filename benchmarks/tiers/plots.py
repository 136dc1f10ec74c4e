"""Plots of `make bench-tiers`, from the raw results that the parts keep."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.plotting import cdf, style
from benchmarks.tiers import vault_restore
from benchmarks.tiers.restore import LABELS
from benchmarks.tiers.stores import NAMES, together

Times = Callable[[dict[str, Any], str], list[float]]


def draw(results: Path, quick: bool) -> None:
    """One PNG for each part that has results."""
    draws = {"restore": _restore, "vault_restore": _vault_restore, "stores": _stores}
    plotting.draw(draws, results, quick)


def restore_times(prompt: dict[str, Any], what: str) -> list[float]:
    """Seconds of one kind, of a prompt that `restore` keeps."""
    return [visit["ttft_s"] for visit in prompt["visits"][what]]


def vault_times(prompt: dict[str, Any], what: str) -> list[float]:
    """The same of `vault_restore`."""
    return list(prompt[what])


def _restore(axes: Any, results: dict[str, Any]) -> None:
    _first_tokens(axes, results, LABELS, restore_times)


def _vault_restore(axes: Any, results: dict[str, Any]) -> None:
    _first_tokens(axes, results, vault_restore.LABELS, vault_times)


def _first_tokens(
    axes: Any, results: dict[str, Any], labels: Mapping[str, str], times: Times
) -> None:
    sizes, taken_s = medians(results, labels, times)
    for what, label in labels.items():
        axes[0].plot(sizes, taken_s[what], marker="o", label=label)
        if what != "cold":
            ratios = [a / b for a, b in zip(taken_s[what], taken_s["hit"], strict=True)]
            axes[1].plot(sizes, ratios, marker="o", label=label)
    axes[0].set_yscale("log")
    style(axes[0], "First token of a prompt", "tokens", "s")
    style(axes[1], "Against a device hit", "tokens", "x")


def medians(
    results: dict[str, Any], kinds: Iterable[str], times: Times
) -> tuple[list[int], dict[str, list[float]]]:
    """Prompt lengths, and for each kind its medians over all rounds; `times` are a prompt's seconds
    of one kind."""
    sizes = sorted(map(int, next(iter(results.values()))["prompts"]))
    found: dict[str, list[float]] = {}
    for what in kinds:
        for tokens in sizes:
            prompts = [each["prompts"][str(tokens)] for each in results.values()]
            seconds = [taken for prompt in prompts for taken in times(prompt, what)]
            found.setdefault(what, []).append(statistics.median(seconds))
    return sizes, found


def _stores(axes: Any, results: dict[str, Any]) -> None:
    for name in NAMES:
        turns = [done for key, done in results.items() if key.startswith(f"{name}-")]
        cdf(axes[0], [gap for turn in turns for gap in together(turn["at_s"])], f"tiers {name}")
        began = [max(times[0] for times in turn["at_s"]) for turn in turns]
        axes[1].plot(range(1, len(began) + 1), began, marker="o", label=f"tiers {name}")
    style(axes[0], "Between tokens of running streams", "ms")
    style(axes[1], "Until every stream has begun", "turn", "s")
