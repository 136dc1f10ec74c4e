"""`breakeven calibrate`: measure a running cluster's curves now, show them, and draw them."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.curve_plot import check, draw, tier_rows
from cluster.status import address, crossover, fetch

# A prompt that was begun in time may end so much later.
_LATE_S = 120.0


def calibrate(budget_s: float, plot: Path | None, as_json: bool) -> int:
    """Print what each replica, link and tier costs, behind about `budget_s` of probing.

    Raises `NotRunningError`, `AdminKeyError`, and `PlotError` for a plot that cannot be drawn.
    """
    if plot is not None:
        check(plot)
    url = address()
    probed = fetch(url, "/admin/curves", {"budget_s": budget_s}, budget_s + _LATE_S)
    report = {**fetch(url, "/admin/curves?points=1"), **fetch(url, "/admin/replicas")}
    if plot is not None:
        draw(report, plot)
    if as_json:
        print(json.dumps({**report, "probed": probed}))
        return 0
    console = Console()
    console.print(_prefill(report["prefill"]))
    console.print(_links({**report["links"], **tier_rows(report["tiers"])}))
    console.print(
        f"{probed['computed']} prompts computed, {probed['handed_off']} handed off, "
        f"{probed['skipped']} left out"
    )
    if plot is not None:
        console.print(f"drawn in {plot}")
    return 0


def _prefill(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("replica", "base", "a token", "1,024 tokens", "requests")
    for name, row in sorted(rows.items()):
        base_s, per_token_s = row["base_s"], row["per_token_s"]
        long_s = base_s + 1024 * per_token_s + 1024**2 * row["per_token2_s"]
        each = (f"{1e3 * base_s:.1f} ms", f"{1e3 * per_token_s:.3f} ms", f"{long_s:.3f} s")
        table.add_row(name, *each, str(row["samples"]))
    return table


def _links(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("link or tier", "latency", "bandwidth", "crossover", "requests")
    for name, row in sorted(rows.items()):
        speed = row["bytes_per_s"]
        table.add_row(
            name,
            f"{1e3 * row['latency_s']:.1f} ms",
            f"{speed / 1e9:.2f} GB/s" if speed else "not measurable",
            crossover(row["crossover_tokens"]),
            str(row["samples"]),
        )
    return table
