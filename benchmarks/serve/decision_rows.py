"""The rows of `decision.py`: medians of its repeats, and what they are held against."""

from collections import Counter
from statistics import median
from typing import Any

from benchmarks.result import Row

DYNAMO = "ai-dynamo-runtime==1.6.1"
MILLION = 1_000_000
# What the planner may take where it searches split points.
SPLIT_US = 400.0
KINDS = {
    "": "",
    "scattered": ", holders at depths of their own",
    "tiered": ", split points searched",
}

# Blocks, replicas, and the kind of load (decision_load.py).
Point = tuple[int, int, str]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _of_rounds(rounds: list[dict[str, Any]], series: str, share: float) -> list[float]:
    return [percentile(each[series], share) for each in rounds]


def _rate(each: dict[str, Any], *series: str) -> float:
    """Decisions a second of the time that these took."""
    spent_us = sum(sum(each[name]) for name in series)
    return len(each[series[0]]) / spent_us * 1e6


def row(
    name: str,
    values: list[float],
    unit: str,
    target: float | None = None,
    at_least: bool = False,
    detail: str = "",
) -> Row:
    """The median of repeats, with their spread."""
    value = median(values)
    ok = target is None or (value >= target if at_least else value <= target)
    if len(values) > 1:
        spread = f"{min(values):.4g} to {max(values):.4g} over {len(values)} repeats"
        detail = f"{spread}; {detail}" if detail else spread
    return Row(name, round(value, 2), unit, target, ok, detail)


def ours(main: dict[str, Any]) -> list[Row]:
    rounds, fill, (blocks, replicas, _) = main["ours"], main["fill"], main["point"]
    at = f"{blocks / MILLION:g} M blocks, {replicas} replicas"
    with_churn = median(_rate(each, "decision_us", "churn_us") for each in rounds)
    parts = ("hashing", "lookup", "scoring")
    shares = [
        row(f"decision: {part} p50", _of_rounds(rounds, f"{part}_us", 0.5), "us") for part in parts
    ]
    return [
        row("decision p50", _of_rounds(rounds, "decision_us", 0.5), "us", detail=at),
        row("decision p99", _of_rounds(rounds, "decision_us", 0.99), "us", 150.0, detail=at),
        row(
            "decisions on one core",
            [_rate(each, "decision_us") for each in rounds],
            "1/s",
            8000.0,
            at_least=True,
            detail=f"{with_churn:.0f}/s with the churn that is taken in between them",
        ),
        *shares,
        _stall(main),
        row("catalogue memory", [fill["bytes_a_block"]], "B/block", 130.0, detail=at),
        row(
            "event ingest",
            [fill["ingest_blocks_s"]],
            "blocks/s",
            500_000.0,
            at_least=True,
            detail="Blocks messages decoded from msgpack and applied, while filling",
        ),
    ]


def _stall(main: dict[str, Any]) -> Row:
    steps = {
        "filling": main["fill"],
        "churn": _longest(main["ours"], "longest_churn"),
        "decision": _longest(main["ours"], "longest_decision"),
        "sweep of a shard": main["restart"],
    }
    longest = max(steps, key=lambda name: steps[name]["longest_ms"])
    told = ", ".join(
        f"{name} {step['longest_ms']:.2f} ({step['longest_cpu_ms']:.2f} on the core)"
        for name, step in steps.items()
    )
    collected = max(each["gc_longest_ms"] for each in [main["fill"], *main["ours"]])
    detail = f"longest step: {told} ms; longest garbage collection {collected:.2f} ms"
    return row("longest stall", [steps[longest]["longest_ms"]], "ms", 5.0, detail=detail)


def _longest(rounds: list[dict[str, Any]], name: str) -> dict[str, float]:
    return {
        field: max(each[name][field] for each in rounds)
        for field in ("longest_ms", "longest_cpu_ms")
    }


def dynamo(main: dict[str, Any]) -> list[Row]:
    names = ("rate against Dynamo's", "rate against Dynamo's with hashes passed in")
    if main["absent"]:
        why = f"not measured: {main['absent']}"
        return [
            Row(names[0], None, "x", 2.5, False, why),
            Row(names[1], None, "x", None, True, why),
        ]
    ours, theirs = main["ours"], main["dynamo"]
    pairs = list(zip(ours, theirs, strict=True))
    rows = []
    for kind, series in (("tokens", "decision_us"), ("hashes", "hashes_us")):
        name = f"Dynamo decision by {kind}"
        rows += [
            row(f"{name} p50", _of_rounds(theirs, series, 0.5), "us"),
            row(f"{name} p99", _of_rounds(theirs, series, 0.99), "us"),
            row(f"{name}, rate", [_rate(each, series) for each in theirs], "1/s"),
        ]
    by_tokens = [_rate(a, "decision_us") / _rate(b, "decision_us") for a, b in pairs]
    by_hashes = [_rate(a, "decision_us") / _rate(b, "hashes_us") for a, b in pairs]
    return [
        *rows,
        row(names[0], by_tokens, "x", 2.5, at_least=True, detail=f"SelectionService of {DYNAMO}"),
        row(names[1], by_hashes, "x", detail="ours still hashes the tokens itself"),
        row("Dynamo memory", [main["dynamo_fill"]["bytes_a_block"]], "B/block"),
    ]


def point_of(point: Point, fill: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = Counter[str]()
    for each in rounds:
        shapes.update(each["shapes"])
    return {
        "blocks": point[0],
        "replicas": point[1],
        "kind": point[2],
        "shapes": shapes,
        "bytes_a_block": fill["bytes_a_block"],
        "ingest_blocks_s": fill["ingest_blocks_s"],
        "fill_longest_ms": fill["longest_ms"],
        "fill_longest_cpu_ms": fill["longest_cpu_ms"],
        "p50_us": _of_rounds(rounds, "decision_us", 0.5),
        "p99_us": _of_rounds(rounds, "decision_us", 0.99),
    }


def growth(points: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for point in points[1:]:
        name = f"decision p99 at {point['blocks'] / MILLION:g} M x {point['replicas']}"
        name += KINDS[point["kind"]]
        detail = (
            f"p50 {median(point['p50_us']):.0f} us, {point['bytes_a_block']:.0f} B/block, "
            f"{point['ingest_blocks_s']:.0f} blocks/s, longest step of filling "
            f"{point['fill_longest_ms']:.2f} ms ({point['fill_longest_cpu_ms']:.2f} on the core)"
        )
        tiered = point["kind"] == "tiered"
        if tiered:
            planned, of_all = point["shapes"], sum(point["shapes"].values())
            told = (f"{name} {100 * n / of_all:.0f} %" for name, n in sorted(planned.items()))
            detail = f"{', '.join(told)}; {detail}"
        target = SPLIT_US if tiered else None
        rows.append(row(name, point["p99_us"], "us", target, detail=detail))
    return rows
