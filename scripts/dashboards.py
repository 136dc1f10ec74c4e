"""Grafana's dashboards as code: `dashboards.py` writes helm/breakeven/monitoring/dashboards/*.json.

Every ingress tells the whole cluster's figures: what is of the cluster is taken from one of them
(`max`), what each counts for itself, requests and plans, is added up (`sum`). Clusters are told
apart by the labels that the chart's PodMonitor gives; where nothing gives any, there is one.
`--check` writes nothing, and exits with 1 where a file would change.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "helm" / "breakeven" / "monitoring" / "dashboards"
_WIDTH, _HEIGHT, _STAT_WIDTH, _STAT_HEIGHT = 12, 8, 6, 4
_CLUSTER = "namespace, ray_io_cluster"
# Which clusters are shown: `.*`, unless some are picked, is any, and a series without the label.
VARIABLE = "$cluster"
_PICKED = f'ray_io_cluster=~"{VARIABLE}"'


@dataclass(frozen=True)
class Panel:
    """One picture: its queries with their legends. A `stat` shows the last value alone."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stat: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def picked(metric: str, *labels: str) -> str:
    """Its series of the clusters that are shown."""
    return f"{metric}{{{', '.join((_PICKED, *labels))}}}"


def each(kind: str, series: str, by: str = "") -> str:
    """An aggregate of each cluster."""
    return f"{kind} by ({', '.join(filter(None, (_CLUSTER, by)))}) ({series})"


def rate(metric: str, by: str = "", *labels: str) -> str:
    """A second, of what each ingress counts for itself."""
    return each("sum", f"rate({picked(metric, *labels)}[$__rate_interval])", by)


def of_cluster(metric: str, by: str = "", *labels: str) -> str:
    """A second, of what every ingress tells of the whole cluster."""
    return each("max", f"rate({picked(metric, *labels)}[$__rate_interval])", by)


def gauge(metric: str, by: str = "") -> str:
    """What every ingress tells of the whole cluster."""
    return each("max", picked(f"breakeven_{metric}"), by)


def quantile(q: float, metric: str, by: str = "") -> str:
    """Of a histogram."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', labels)})"


def spread(metric: str) -> tuple[tuple[str, str], ...]:
    """Its median and its tail."""
    return tuple((quantile(q, metric), f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


def _of_engines(metric: str) -> str:
    """A second, by each engine's own endpoint."""
    return rate(metric, "instance")


def _of_each(metric: str) -> str:
    """Of each replica."""
    return gauge(f"replica_{metric}", "role, replica")


_LINK, _BY_LINK = "source_tier, transport", "{{source_tier}} by {{transport}}"
_TTFT, _ITL = "breakeven_request_ttft_seconds", "breakeven_request_itl_seconds"
_GOOD = rate(f"{_TTFT}_bucket", "", 'le="2.0"')
_TOKENS = "breakeven_prompt_tokens_total"
_ALL_TOKENS = each("sum", of_cluster(_TOKENS, "source"))
_HIT_TOKENS = of_cluster(_TOKENS, "source", 'source!="computed"')

OVERVIEW = Board(
    "breakeven-overview",
    "Breakeven: overview",
    (
        Panel(
            "Goodput",
            "Share of answers whose first token came within 2 s",
            "percentunit",
            ((f"{_GOOD} / {rate(f'{_TTFT}_count')}", "within 2 s"),),
            stat=True,
        ),
        Panel(
            "Median first token",
            "Of all requests",
            "s",
            ((quantile(0.5, _TTFT), "p50"),),
            stat=True,
        ),
        Panel(
            "Requests a second",
            "That ended",
            "reqps",
            ((rate("breakeven_requests_total"), "requests"),),
            stat=True,
        ),
        Panel(
            "Replicas up",
            "By role",
            "none",
            ((gauge("replicas_up", "role"), "{{role}}"),),
            stat=True,
        ),
        Panel("Time to first token", "From the plan on", "s", spread(_TTFT)),
        Panel("Time between tokens", "While a request streams", "s", spread(_ITL)),
        Panel(
            "Plans",
            "What requests were planned as, and why",
            "reqps",
            ((rate("breakeven_plan_total", "plan, reason"), "{{plan}}: {{reason}}"),),
        ),
        Panel(
            "Requests by how they ended",
            "And by class",
            "reqps",
            ((rate("breakeven_requests_total", "class, outcome"), "{{class}}: {{outcome}}"),),
        ),
        Panel(
            "Background work",
            "Batch requests that wait for room, and that run",
            "none",
            (
                (each("sum", picked("breakeven_batch_waiting")), "wait"),
                (each("sum", picked("breakeven_batch_running")), "run"),
            ),
        ),
        Panel(
            "Decision",
            "Naming blocks, looking up and planning",
            "s",
            spread("breakeven_router_decision_seconds"),
        ),
    ),
)

BREAKEVEN = Board(
    "breakeven-break-even",
    "Breakeven: break-even",
    (
        Panel(
            "Actual over predicted first token",
            "1 is a perfect prediction; interactive requests that were planned once",
            "none",
            spread("breakeven_plan_error_ratio"),
        ),
        Panel(
            "The same by plan",
            "Medians",
            "none",
            ((quantile(0.5, "breakeven_plan_error_ratio", "plan"), "{{plan}}"),),
        ),
        Panel(
            "Prompt tokens by source",
            "Where the KV of prompts came from",
            "none",
            ((of_cluster(_TOKENS, "source"), "{{source}}"),),
        ),
        Panel(
            "Break-even prefix",
            "The tokens from which on fetching costs no more than computing",
            "none",
            ((gauge("crossover_tokens", _LINK), _BY_LINK),),
        ),
        Panel(
            "Latency of links",
            "Median of a kind, without bytes",
            "s",
            ((gauge("link_latency_seconds", _LINK), _BY_LINK),),
        ),
        Panel(
            "Speed of links",
            "Median of a kind",
            "Bps",
            ((f"1 / ({gauge('link_seconds_per_byte', _LINK)} > 0)", _BY_LINK),),
        ),
        Panel(
            "Computing 1,024 tokens",
            "Median of a role",
            "s",
            ((gauge("prefill_seconds", "role"), "{{role}}"),),
        ),
        Panel(
            "Regret",
            "How likely a block that leaves paged KV is asked for again",
            "percentunit",
            ((gauge("eviction_regret_ratio"), "chance"),),
        ),
    ),
)

KV_PLANE = Board(
    "breakeven-kv-plane",
    "Breakeven: KV plane",
    (
        Panel(
            "KV held by tiers",
            "The device tier is what is cached in paged KV",
            "bytes",
            ((gauge("tier_bytes", "tier"), "{{tier}}"),),
        ),
        Panel(
            "Hits",
            "Share of prompt tokens that no engine computed",
            "percentunit",
            ((f"{_HIT_TOKENS} / on ({_CLUSTER}) group_left {_ALL_TOKENS}", "{{source}}"),),
        ),
        Panel(
            "Evictions",
            "Blocks that paged KV gave up, a second",
            "none",
            ((of_cluster("breakeven_evicted_blocks_total"), "blocks"),),
        ),
        Panel(
            "Leases",
            "Finished prefills whose blocks wait to be read",
            "none",
            ((gauge("leases"), "leases"),),
        ),
        Panel(
            "KV moved",
            "By the tier that it came from and the transport",
            "Bps",
            ((of_cluster("breakeven_transfer_bytes_total", _LINK), _BY_LINK),),
        ),
        Panel(
            "Time spent reading",
            "Seconds a second, of all replicas",
            "none",
            ((of_cluster("breakeven_transfer_seconds_total", _LINK), _BY_LINK),),
        ),
        Panel(
            "Reads that failed",
            "And were computed anew, a second",
            "none",
            (
                (rate("breakeven_engine_failed_transfers_total"), "of other engines"),
                (rate("breakeven_engine_failed_loads_total"), "of tiers"),
            ),
        ),
        Panel(
            "Vault",
            "What it stores by codec, and may store in all",
            "bytes",
            (
                (gauge("vault_bytes", "codec"), "{{codec}}"),
                (gauge("vault_quota_bytes"), "quota"),
            ),
        ),
        Panel(
            "Catalogue",
            "How old the oldest change was when it was taken in",
            "s",
            ((gauge("catalogue_lag_seconds"), "lag"),),
        ),
        Panel(
            "Replicas that fell back to TCP",
            "On nodes with RDMA",
            "none",
            ((gauge("rdma_fallbacks"), "replicas"),),
        ),
    ),
)

REPLICAS = Board(
    "breakeven-replicas",
    "Breakeven: replicas",
    (
        Panel(
            "Prompt tokens to compute",
            "The queue of each replica",
            "none",
            ((_of_each("pending_prefill_tokens"), "{{replica}}"),),
        ),
        Panel("Requests that run", "In the batch", "none", ((_of_each("running"), "{{replica}}"),)),
        Panel("Requests that wait", "For a seat", "none", ((_of_each("waiting"), "{{replica}}"),)),
        Panel(
            "Paged KV",
            "Share of pages that are held",
            "percentunit",
            ((_of_each("kv_usage"), "{{replica}}"),),
        ),
        Panel("Up", "1 while a replica answers", "none", ((_of_each("up"), "{{replica}}"),)),
        Panel(
            "Time between tokens",
            "By class, p95",
            "s",
            ((quantile(0.95, _ITL, "class"), "{{class}}"),),
        ),
        Panel(
            "Tokens generated",
            "A second, by each engine's own endpoint",
            "none",
            ((_of_engines("breakeven_engine_generated_tokens_total"), "{{instance}}"),),
        ),
        Panel(
            "vLLM's prefix cache",
            "Hits over queries, by engine",
            "percentunit",
            (
                (
                    f"{_of_engines('vllm:prefix_cache_hits_total')} / "
                    f"{_of_engines('vllm:prefix_cache_queries_total')}",
                    "{{instance}}",
                ),
            ),
        ),
    ),
)

BOARDS = (OVERVIEW, BREAKEVEN, KV_PLANE, REPLICAS)


def rendered(board: Board) -> str:
    """As Grafana takes it."""
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["breakeven"])
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_clusters(source))
    )
    for panel in board.panels:
        made = made.with_panel(_drawn(panel, source))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _clusters(source: Any) -> Any:
    """The variable that picks clusters; all of them until somebody does."""
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.models.dashboard import (
        VariableOption,
        VariableRefresh,
        VariableSort,
    )

    return (
        dashboard.QueryVariable(VARIABLE.removeprefix("$"))
        .label("Cluster")
        .datasource(source)
        .query("label_values(breakeven_catalogue_up, ray_io_cluster)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".*")
        .multi(True)
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _drawn(panel: Panel, source: Any) -> Any:
    from grafana_foundation_sdk.builders import prometheus, stat, timeseries

    kind = stat.Panel if panel.stat else timeseries.Panel
    width, height = (_STAT_WIDTH, _STAT_HEIGHT) if panel.stat else (_WIDTH, _HEIGHT)
    made = kind().title(panel.title).description(panel.about).unit(panel.unit)
    made = made.datasource(source).span(width).height(height).min(0)
    for letter, (query, legend) in zip(ascii_uppercase, panel.queries, strict=False):
        # Nothing but a space where there are no such labels.
        named = f"{legend} {{{{ray_io_cluster}}}}"
        asked = prometheus.Dataquery().ref_id(letter).expr(query).legend_format(named)
        made = made.with_target(asked)
    return made


def queries(boards: Sequence[Board] = BOARDS) -> list[tuple[str, str, str]]:
    """Dashboard, panel and query, of every query there is."""
    return [
        (board.title, panel.title, query)
        for board in boards
        for panel in board.panels
        for query, _ in panel.queries
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    changed = 0
    for board in BOARDS:
        path, text = FOLDER / f"{board.uid}.json", rendered(board)
        if path.exists() and path.read_text() == text:
            continue
        changed += 1
        print(f"{path.name} {'would change' if checking else 'written'}")
        if not checking:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(checking and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
