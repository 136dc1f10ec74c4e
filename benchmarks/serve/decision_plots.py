"""The plots of `decision.py`, drawn from what it wrote."""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MILLION = 1_000_000


def draw(report: dict[str, Any], folder: Path) -> None:
    _latency(report, folder / "decision-latency.png")
    _growth(report["series"]["points"], folder / "decision-growth.png")


def _latency(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    shown = {
        "Breakeven, tokens": "ours_us",
        "Dynamo, tokens": "dynamo_us",
        "Dynamo, hashes passed in": "dynamo_hashes_us",
    }
    for label, name in shown.items():
        quantiles = [
            median(each[min(len(each) - 1, _place(each, share))] for each in rounds)
            for rounds in [report["series"][name]]
            if rounds
            for share in SHARES
        ]
        if quantiles:
            axes.plot(quantiles, SHARES, label=label)
    axes.axvline(150, color="grey", linestyle=":", label="target for p99")
    axes.axhline(0.99, color="grey", linewidth=0.5)
    axes.set(xlabel="decision, us", ylabel="share of decisions", xlim=(0, None))
    axes.set_title("4,096 tokens in, a plan out (median of the repeats)")
    axes.legend()
    _save(figure, path)


# What decision.py keeps of a series: every tenth value, and all of the last hundredth.
SHARES = [share / 200 for share in range(1, 199)]


def _place(kept: list[float], share: float) -> int:
    """Where a share of the whole series lies among what was kept of it."""
    tail = next(size for size in range(len(kept), 0, -1) if _kept(size * 10) <= len(kept))
    return int(share * tail)


def _kept(whole: int) -> int:
    bulk = whole - whole // 100
    return -(-bulk // 10) + whole // 100


def _growth(points: list[dict[str, Any]], path: Path) -> None:
    figure, (by_blocks, by_replicas, memory) = plt.subplots(1, 3, figsize=(12, 4))
    alike = [point for point in points if not point["kind"]]
    replicas, blocks = points[0]["replicas"], points[0]["blocks"]
    grown = sorted(
        (point for point in alike if point["replicas"] == replicas), key=lambda p: p["blocks"]
    )
    _latencies(by_blocks, [point["blocks"] / MILLION for point in grown], grown)
    by_blocks.set(xlabel=f"million blocks, {replicas} replicas", ylabel="us", xscale="log")
    wide = sorted(
        (point for point in alike if point["blocks"] == blocks), key=lambda p: p["replicas"]
    )
    _latencies(by_replicas, [point["replicas"] for point in wide], wide)
    by_replicas.set(xlabel=f"replicas, {blocks / MILLION:g} M blocks", ylabel="us", xscale="log")
    memory.plot(
        [point["blocks"] / MILLION for point in grown],
        [point["bytes_a_block"] for point in grown],
        marker="o",
    )
    memory.axhline(130, color="grey", linestyle=":")
    memory.set(xlabel="million blocks", ylabel="bytes a block", xscale="log", ylim=(0, None))
    _save(figure, path)


def _latencies(axes: Axes, x: list[float], points: list[dict[str, Any]]) -> None:
    for name in ("p50_us", "p99_us"):
        middle = [median(point[name]) for point in points]
        spread = [
            [m - min(point[name]) for m, point in zip(middle, points, strict=True)],
            [max(point[name]) - m for m, point in zip(middle, points, strict=True)],
        ]
        axes.errorbar(x, middle, spread, marker="o", capsize=3, label=name[:3])
    axes.axhline(150, color="grey", linestyle=":")
    axes.set_ylim(0, None)
    axes.legend()


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
