"""The plot of the part `batch`: people's time to first token, and their gaps between tokens."""

from typing import Any

from benchmarks.plotting import cdf, style


def panel(axes: Any, results: dict[str, Any]) -> None:
    """Two axes, and the part's raw results by their keys."""
    for name, label in (("alone", "without batch requests"), ("beside", "with them")):
        runs = [done for key, done in results.items() if key.rsplit("-", 1)[0] == name]
        for at, what in zip(axes, ("ttft_s", "gaps_s"), strict=True):
            values = [value for run in runs for value in run[what]]
            if values:
                cdf(at, values, label)
    style(axes[0], "People at half of saturation", "TTFT, ms")
    style(axes[1], "The same", "between tokens, ms")
