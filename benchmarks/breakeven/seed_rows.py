"""What the cells of the part `seed` say: the bound on what a hit saves, and what prefixes save."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.result import Row, shown, spread


def prefill_shares(kept: Mapping[str, Any]) -> dict[tuple[int, int], list[float]]:
    """The time to the first token, of the time to the last one: by input and output tokens."""
    found: dict[tuple[int, int], list[float]] = {}
    for key, cell in kept.items():
        if key.startswith("alone/"):
            for output, latency_s in cell["latency_s"].items():
                share = cell["ttft_s"] / latency_s
                found.setdefault((cell["tokens"], int(output)), []).append(share)
    return dict(sorted(found.items()))


def prefixes(kept: Mapping[str, Any]) -> dict[int, list[dict[str, float]]]:
    """By how many ran at once, and from the smallest share of a common prefix: hit ratio, requests
    a second, and their mean time."""
    found: dict[int, list[dict[str, float]]] = {}
    for key, cell in kept.items():
        if key.startswith("common/"):
            point = {
                "share": cell["share"],
                "hit_ratio": cell["cached_tokens"] / cell["prompt_tokens"],
                "per_s": len(cell["latency_s"]) / cell["wall_s"],
                "latency_s": statistics.fmean(cell["latency_s"]),
            }
            found.setdefault(cell["at_once"], []).append(point)
    return {count: sorted(points, key=lambda p: p["share"]) for count, points in found.items()}


def rows(kept: Mapping[str, Any]) -> list[Row]:
    """Every figure of (a) and (b)."""
    return [*_bounds(prefill_shares(kept)), *_gains(prefixes(kept))]


def _bounds(shares: Mapping[tuple[int, int], Sequence[float]]) -> list[Row]:
    found = []
    for (inputs, outputs), each in shares.items():
        share = statistics.median(each)
        name = f"prefill, of the time of {inputs} tokens in and {outputs} out"
        most = f"a hit makes it at most {1 / (1 - share):.2g} times as quick"
        found.append(shown(name, share, "share", f"{most}; {spread(each)}"))
    return found


def _gains(found: Mapping[int, Sequence[Mapping[str, float]]]) -> list[Row]:
    lines = []
    for at_once, points in found.items():
        none = points[0]
        for point in points:
            name = f"{point['share']:.0%} common, {at_once} at once: mean time of a request"
            more = point["per_s"] / none["per_s"]
            detail = (
                f"hit ratio {point['hit_ratio']:.2f}; {point['per_s']:.2f} requests a second, "
                f"{more:.2f} times those of {none['share']:.0%}"
            )
            lines.append(shown(name, point["latency_s"], "s", detail))
    return lines
