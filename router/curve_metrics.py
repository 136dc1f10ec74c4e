"""What things cost now, for dashboards: medians over links of a kind, since pairs are too many."""

from collections.abc import Iterator
from statistics import median

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kv.catalogue import Tier
from kv.crossover import crossover_tokens
from kv.curve import LinkCurve
from router.fleet import Fleet
from router.member import Member
from router.metrics import TRANSPORTS
from router.tier_curves import curve_of

_LABELS = ["source_tier", "transport"]
# A prompt by which replicas are compared.
_TOKENS = 1024

# A link and who receives by it.
_Receiving = tuple[LinkCurve, Member]


class CurveMetrics(Collector):
    """By the tier that a link starts at and its transport; prefill by role."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        latency = GaugeMetricFamily(
            "breakeven_link_latency_seconds", "Of a link, without bytes", labels=_LABELS
        )
        per_byte = GaugeMetricFamily(
            "breakeven_link_seconds_per_byte", "Of a link, each byte", labels=_LABELS
        )
        crossover = GaugeMetricFamily(
            "breakeven_crossover_tokens",
            "The prefix from which on fetching costs no more than computing; none where never",
            labels=_LABELS,
        )
        for kind, links in sorted(self._links().items()):
            latency.add_metric(kind, median(link.latency_s for link, _ in links))
            per_byte.add_metric(kind, median(link.per_byte_s for link, _ in links))
            found = [tokens for tokens in map(_crossover, links) if tokens is not None]
            if found:
                crossover.add_metric(kind, median(found))
        yield latency
        yield per_byte
        yield crossover
        yield self._prefill()

    def _links(self) -> dict[tuple[str, str], list[_Receiving]]:
        links: dict[tuple[str, str], list[_Receiving]] = {}
        for (_, destination), link in self._fleet.pairs.links.items():
            receiver = self._fleet.member(destination)
            if receiver is not None:
                lanes = ",".join(receiver.load.lanes) or "unknown"
                links.setdefault((str(Tier.DEVICE), lanes), []).append((link, receiver))
        transports = dict(TRANSPORTS)
        for member in self._fleet.members():
            told = {tier: curve_of(each) for tier, each in self._fleet.tiers_of(member).items()}
            if member.replica.peer_address:
                told[Tier.PEER] = curve_of(self._fleet.peer_of(member))
            for tier, link in told.items():
                links.setdefault((tier, transports[tier]), []).append((link, member))
        return links

    def _prefill(self) -> Metric:
        gauge = GaugeMetricFamily(
            "breakeven_prefill_seconds", f"To compute {_TOKENS} new tokens", labels=["role"]
        )
        by_role: dict[str, list[float]] = {}
        for member in self._fleet.members():
            seconds = member.speed.curve.seconds(_TOKENS, 0)
            by_role.setdefault(member.replica.role, []).append(seconds)
        for role, found in sorted(by_role.items()):
            gauge.add_metric([role], median(found))
        return gauge


def _crossover(receiving: _Receiving) -> float | None:
    link, receiver = receiving
    token_bytes = receiver.replica.kv_bytes_per_token
    return crossover_tokens(receiver.speed.curve, link, token_bytes)
