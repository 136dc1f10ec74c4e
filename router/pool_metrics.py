"""Whether each pool is whole: a replica that has died leaves no series behind that would say so."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.fleet import Fleet
from router.vault import VaultView
from workers.messages import Role


class PoolMetrics(Collector):
    """By role, how many there are to be (`wanted`, as configured) and how many answer; a vault's
    are its shards."""

    def __init__(self, fleet: Fleet, vault: VaultView, wanted: Mapping[str, int]) -> None:
        self._fleet, self._vault, self._wanted = fleet, vault, wanted

    def collect(self) -> Iterator[Metric]:
        up = {role: len(self._fleet.up(role)) for role in Role} | {"vault": self._vault.up}
        for name, about, counts in (
            ("wanted", "How many there are to be", self._wanted),
            ("up", "How many answer", up),
        ):
            gauge = GaugeMetricFamily(f"breakeven_replicas_{name}", about, labels=["role"])
            for role in up:
                gauge.add_metric([role], counts.get(role, 0))
            yield gauge
