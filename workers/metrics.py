"""What one process of the cluster says of itself to Prometheus, on an endpoint of its own.

An ingress has the whole cluster's sums; these are each engine's and each shard's, with what vLLM
and Python measure in the same process. Names begin with `breakeven_engine_` and `breakeven_shard_`,
so that no sum counts them twice.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from kv.catalogue import Tier
from kv.vault.wire import Stats
from workers.errors import MetricsPortError
from workers.messages import Load

_GAUGES = {
    "waiting": "Requests that have no seat yet",
    "running": "Requests in the batch",
    "pending_prefill_tokens": "Prompt tokens still to compute",
    "leased": "Finished prefills whose blocks wait to be read",
}
_TOTALS = {
    "generated_tokens": "Tokens generated",
    "transfer_bytes": "Bytes of KV read from other engines",
    "failed_transfers": "Reads of other engines' KV that failed",
    "failed_loads": "Fetches from tiers that did not bring all, or came too late",
    "evicted_blocks": "Blocks that paged KV gave up",
    "expired_leases": "Prefills whose blocks nobody read in time",
}


class _Quiet(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def _answer(environ: dict[str, Any], begin: Any) -> Any:
    """In Prometheus' own text format, whatever is asked for: in OpenMetrics prometheus-client 0.26
    writes vLLM's `vllm:` as `vllm_`, by which no dashboard knows it."""
    return _EXPOSED({**environ, "HTTP_ACCEPT": "text/plain; version=0.0.4"}, begin)


_EXPOSED = make_wsgi_app(REGISTRY)


class Endpoint:
    """Answers `GET /metrics` in a thread of its own until closed; `address` is host and port."""

    def __init__(self, host: str, port: int | None, collector: Collector) -> None:
        """`port` None is any free one. Raises `MetricsPortError` for one that is taken."""
        try:
            self._server = make_server(host, port or 0, _answer, ThreadingWSGIServer, _Quiet)
        except OSError as error:
            complaint = error.strerror or str(error)
            raise MetricsPortError(f"{host}:{port or 0}", complaint) from error
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._collector = collector
        REGISTRY.register(collector)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Answer no more."""
        REGISTRY.unregister(self._collector)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class EngineMetrics(Collector):
    """An engine's load, as it last told it to ingresses."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"breakeven_engine_{name}", about, getattr(load, name))
        about = "Pages of paged KV that are held"
        yield GaugeMetricFamily("breakeven_engine_kv_usage_ratio", about, load.kv_usage)
        for name, about in _TOTALS.items():
            total = getattr(load.totals, name)
            yield CounterMetricFamily(f"breakeven_engine_{name}", about, total)
        yield _tokens(load)
        blocks = GaugeMetricFamily(
            "breakeven_engine_tier_blocks", "Blocks behind paged KV", labels=["tier"]
        )
        for tier, held in load.tiers.items():
            blocks.add_metric([tier], held.blocks)
        yield blocks


def _tokens(load: Load) -> Metric:
    tokens = CounterMetricFamily(
        "breakeven_engine_prompt_tokens", "Prompt tokens by source", labels=["source"]
    )
    for source in (*Tier, "computed", "received"):
        tokens.add_metric([source], getattr(load.totals, f"prompt_tokens_{source}"))
    return tokens


class ShardMetrics(Collector):
    """What a vault's shard holds."""

    def __init__(self, stats: Callable[[], Stats], quota_bytes: int) -> None:
        self._stats, self._quota_bytes = stats, quota_bytes

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("breakeven_shard_blocks", "Blocks held", stats.blocks)
        yield GaugeMetricFamily(
            "breakeven_shard_stored_bytes", "Bytes of their frames", stats.stored_bytes
        )
        about = "Bytes that may be stored in all"
        yield GaugeMetricFamily("breakeven_shard_quota_bytes", about, self._quota_bytes)
