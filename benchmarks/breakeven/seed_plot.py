"""The pictures of the part `seed`; restores are those that `make bench-tiers` has recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.breakeven.seed_rows import prefill_shares, prefixes
from benchmarks.plotting import plt, style
from benchmarks.result import ROOT, raw_folder
from benchmarks.tiers import plots as tiers
from benchmarks.tiers.restore import LABELS
from benchmarks.tiers.vault_restore import LABELS as VAULT_LABELS

_RECORDED = ROOT / "benchmarks" / "tiers" / "results"
_COMMON = {
    "hit_ratio": ("Prompt tokens from the cache", "share"),
    "per_s": ("Throughput", "requests a second"),
    "latency_s": ("Mean time of a request", "s"),
}


def draw(kept: Mapping[str, Any], into: Path) -> None:
    """`seed.png`: the bound, and restores where some are recorded; `seed-prefixes.png`: a common
    prefix that grows."""
    recorded = _recorded()
    figure, axes = plt.subplots(1, 2 if recorded else 1, figsize=(11, 4), squeeze=False)
    _bound(axes[0][0], kept)
    if recorded:
        _restores(axes[0][1], recorded)
    _save(figure, into / "seed.png")
    figure, axes = plt.subplots(1, len(_COMMON), figsize=(13, 4))
    for panel, (what, (title, unit)) in zip(axes, _COMMON.items(), strict=True):
        for at_once, points in prefixes(kept).items():
            shares, values = ([100 * p["share"] for p in points], [p[what] for p in points])
            panel.plot(shares, values, marker="o", label=f"{at_once} at once")
        panel.set_ylim(bottom=0.0)
        style(panel, title, "common prefix, % of the prompt", unit)
    _save(figure, into / "seed-prefixes.png")


def _bound(axes: Any, kept: Mapping[str, Any]) -> None:
    shares = prefill_shares(kept)
    for outputs in sorted({outputs for _, outputs in shares}):
        points = [(i, median(each)) for (i, o), each in shares.items() if o == outputs]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{outputs} tokens out")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0.0, 1.0)
    style(axes, "Prefill's share: the most that a hit can save", "prompt tokens", "share")


def _recorded() -> dict[str, dict[str, Any]]:
    """What `make bench-tiers` has recorded of restores, by part."""
    raw = raw_folder(_RECORDED, quick=False)
    paths = (raw / f"{part}.json" for part in ("restore", "vault_restore"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def _restores(axes: Any, recorded: Mapping[str, dict[str, Any]]) -> None:
    for part, labels, times in (
        ("restore", LABELS, tiers.restore_times),
        ("vault_restore", VAULT_LABELS, tiers.vault_times),
    ):
        # Computing and device hits are in both; the first part's are drawn.
        if part == "vault_restore" and "restore" in recorded:
            labels = {what: said for what, said in labels.items() if what not in LABELS}
        if part in recorded:
            sizes, taken_s = tiers.medians(recorded[part]["results"], labels, times)
            for what, label in labels.items():
                axes.plot(sizes, taken_s[what], marker="o", label=label)
    axes.set_yscale("log")
    at = ", ".join(sorted({told["commit"] for told in recorded.values()}))
    style(axes, f"First token (from bench-tiers at {at})", "prompt tokens", "s")
    axes.legend(fontsize=7, loc="center right")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
