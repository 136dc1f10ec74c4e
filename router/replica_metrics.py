"""How busy each replica is, as it last told: what an operator looks at when the sums are high."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.fleet import Fleet
from router.member import Member
from workers.messages import Load

_GAUGES = {
    "running": "Requests in the batch",
    "waiting": "Requests that have no seat yet",
    "pending_prefill_tokens": "Prompt tokens still to compute",
    "kv_usage": "Pages of paged KV that are held, as a ratio",
}
_LABELS = ["role", "replica"]
# UCX's other transports; those of GPUs copy within a node.
_NO_RDMA = {
    *("tcp", "sysv", "posix", "cma", "xpmem", "knem", "self"),
    *("cuda_copy", "cuda_ipc", "gdr_copy"),
}


class ReplicaMetrics(Collector):
    """A series a replica; one that is down has no load."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        members = self._fleet.members()
        for name, about in _GAUGES.items():
            gauge = GaugeMetricFamily(f"breakeven_replica_{name}", about, labels=_LABELS)
            for member in members:
                value = getattr(member.load if member.up else Load(), name)
                gauge.add_metric([member.replica.role, member.name], value)
            yield gauge
        about = "Replicas on nodes with RDMA that read KV by something else"
        yield GaugeMetricFamily("breakeven_rdma_fallbacks", about, sum(map(_fell_back, members)))


def _fell_back(member: Member) -> bool:
    """Shared memory alone is no fallback: both replicas are on one node."""
    used = {lane.split("/", 1)[0] for lane in member.load.lanes}
    return member.replica.rdma and "tcp" in used and used <= _NO_RDMA
