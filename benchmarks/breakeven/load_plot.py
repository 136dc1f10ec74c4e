"""The plot of the part `load`: goodput against the offered rate, by policy."""

from typing import Any

from benchmarks.breakeven.goodput import POLICIES, Window, by_factor, targets
from benchmarks.breakeven.load import MULTIPLES, window_of
from benchmarks.plotting import style

_LABELS = {
    "breakeven": "ours",
    "prefix_affinity": "prefix affinity",
    "threshold": "tuned threshold",
    "always_compute": "always compute",
}


def panel(axes: Any, results: dict[str, Any]) -> None:
    """Two axes, each for one multiple of the targets; the part's raw results by their keys."""
    windows = _windows(results)
    if not windows:
        return
    # The arrivals that were sent, which are the same by every policy.
    offered = {w.factor: len(w.sent) / w.seconds for w in windows}
    for at, multiple in zip(axes, MULTIPLES, strict=True):
        wanted = targets(results["lone"], multiple)
        for policy, curve in by_factor(windows, wanted).items():
            rates = [offered[factor] for factor in curve]
            [line] = at.plot(rates, list(curve.values()), label=_LABELS[policy])
            mine = [w for w in windows if w.policy == policy]
            each = [w.goodput(wanted) for w in mine]
            at.scatter([offered[w.factor] for w in mine], each, s=12, color=line.get_color())
        ends = [0.0, max(offered.values())]
        at.plot(ends, ends, ":", color="grey", label="all of them")
        style(at, f"TTFT and ITL within {multiple:g}x unloaded", "offered, 1/s", "good, 1/s")


def _windows(results: dict[str, Any]) -> list[Window]:
    found = []
    for key, told in results.items():
        policy, *rest = key.split("/")
        if policy in POLICIES:
            found.append(window_of(told, policy, float(rest[0]), int(rest[1])))
    return found
