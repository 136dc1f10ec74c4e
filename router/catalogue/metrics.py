"""What a catalogue's process says of itself to Prometheus. Ingresses tell what they hear of it, so
its names begin with `breakeven_catalogue_node_`: no sum counts them twice."""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.catalogue.wire import Beat


class CatalogueMetrics(Collector):
    """Its last beat, and how many ingresses it answers. Both are asked on a thread of their own."""

    def __init__(self, last: Callable[[], Beat], ingresses: Callable[[], int]) -> None:
        self._last, self._ingresses = last, ingresses

    def collect(self) -> Iterator[Metric]:
        beat = self._last()
        for name, about, value in (
            ("blocks", "Blocks of paged KV that replicas hold", sum(beat.blocks.values())),
            ("replicas", "Replicas whose blocks it follows", len(beat.blocks)),
            ("lag_seconds", "Age of the oldest change of blocks when it was taken in", beat.lag_s),
            ("ingresses", "Ingresses that it answers", self._ingresses()),
        ):
            yield GaugeMetricFamily(f"breakeven_catalogue_node_{name}", about, value)
