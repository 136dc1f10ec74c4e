"""What fetching from an engine's tiers, and from other replicas, takes it: the curves it tells."""

from collections.abc import Callable, Container

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES, FetchCost
from kv.live import RETRY_S
from workers.messages import FetchLoad, LossyLoad, Sources, Spent, TierLoad

# A peer that has not got a block yet is asked again after so long (`workers.peer.question`): so
# much later than it could have been a block may come.
ASKING_S = 0.02


class Fetches:
    """Of one engine with these tiers; `retry_s` is `kv.live`'s."""

    def __init__(
        self, tiers: tuple[Tier, ...], now: Callable[[], float], retry_s: float | None = RETRY_S
    ) -> None:
        self._now, self._retry_s = now, retry_s
        there = (*tiers, Tier.PEER) if tiers else ()
        self._costs = {tier: FetchCost(GUESSES[tier], retry_s) for tier in there}
        # Of blocks that a lossy codec made smaller, from when the first was fetched.
        self._lossy: dict[Tier, FetchCost] = {}
        self._giving_way: set[str] = set()

    def __contains__(self, tier: Tier) -> bool:
        return tier in self._costs

    # ------------------------------------------------------------------ what was seen

    def gives_way(self, request_id: str, there: Container[str]) -> None:
        """A request came that lets others go first, beside those that are `there`: what it waits is
        no measure."""
        self._giving_way = {name for name in self._giving_way if name in there} | {request_id}

    def waited(self, request_id: str, sources: Sources, spent: Spent) -> None:
        """What a request waited for a tier, if one alone brought what it lacked."""
        if request_id in self._giving_way:
            self._giving_way.discard(request_id)
            return
        told = (sources.host_tokens, sources.disk_tokens, sources.vault_tokens)
        by_tier = dict(zip((Tier.HOST, Tier.DISK, Tier.VAULT), told, strict=True))
        gave = [tier for tier, tokens in by_tier.items() if tokens]
        others = sources.received_tokens + sources.peer_tokens
        if len(gave) != 1 or others or gave[0] not in self._costs:
            return
        (tier,), now_s, seconds = gave, self._now(), spent.loading_s
        if tier is not Tier.HOST:  # they went through host memory
            seconds -= self._host_per_byte_s() * spent.loaded_bytes
        cost = self._cost(tier, spent.lossy)
        saw = cost.saw_at_most if spent.others_tokens or spent.beside else cost.saw
        saw(spent.loaded_bytes, seconds, now_s)

    def copied(self, tier: Tier, lossy: bool, n_bytes: int, seconds: float) -> None:
        """What bringing so many bytes into host memory took at least, whoever waited for them."""
        self._cost(tier, lossy).saw_at_least(n_bytes, seconds, self._now())

    def borrowed(self, n_bytes: int, seconds: float) -> None:
        """What one load's bytes took to come from a peer, once that had them. What a request waits
        for a peer is no measure: in a split the peer computes meanwhile."""
        cost = self._costs[Tier.PEER]
        cost.saw_between(n_bytes, seconds, seconds + ASKING_S, self._now())

    # ------------------------------------------------------------------ what is told

    def curve(self, tier: Tier) -> LinkCurve:
        """Seconds to bring bytes from a tier into the paged KV; through the host tier, if not from
        there."""
        own = self._costs[tier].curve(self._now())
        return LinkCurve(own.latency_s, own.per_byte_s + self._beside_per_byte_s(tier))

    def lossy_curve(self, tier: Tier, share: float) -> LinkCurve:
        """The same for pages that a lossy codec stored; it made them smaller to this `share`, by
        which it is guessed what fetching them costs until one was."""
        found = self._costs[tier].curve(self._now())
        if tier in self._lossy and self._lossy[tier].samples:
            found = self._lossy[tier].curve(self._now())
        else:
            found = LinkCurve(found.latency_s, found.per_byte_s * share)
        return LinkCurve(found.latency_s, found.per_byte_s + self._host_per_byte_s())

    def load(
        self, tier: Tier, blocks: int, unnamed: int, lossy_share: float | None = None
    ) -> TierLoad:
        """What is told of a tier that holds so many; `lossy_share` as in `lossy_curve`, None where
        no codec is."""
        cost, curve = self._costs[tier], self.curve(tier)
        lossy = None if lossy_share is None else self._lossy_load(tier, lossy_share)
        seen, costs = cost.seen(self._beside_per_byte_s(tier)), (curve.latency_s, curve.per_byte_s)
        return TierLoad(blocks, unnamed, *costs, cost.samples, lossy, seen)

    def peer(self) -> FetchLoad | None:
        """What is told of blocks that others lend."""
        cost = self._costs.get(Tier.PEER)
        if cost is None or not cost.samples:
            return None
        curve, seen = self.curve(Tier.PEER), cost.seen(self._host_per_byte_s())
        return FetchLoad(curve.latency_s, curve.per_byte_s, cost.samples, seen)

    def _lossy_load(self, tier: Tier, share: float) -> LossyLoad:
        curve, cost = self.lossy_curve(tier, share), self._lossy.get(tier)
        known = (0, ()) if cost is None else (cost.samples, cost.seen(self._host_per_byte_s()))
        return LossyLoad(curve.latency_s, curve.per_byte_s, *known, share)

    def _cost(self, tier: Tier, lossy: bool) -> FetchCost:
        if not lossy or tier is not Tier.VAULT:
            return self._costs[tier]
        if tier not in self._lossy:
            self._lossy[tier] = FetchCost(GUESSES[tier], self._retry_s)
        return self._lossy[tier]

    def _beside_per_byte_s(self, tier: Tier) -> float:
        return 0.0 if tier is Tier.HOST else self._host_per_byte_s()

    def _host_per_byte_s(self) -> float:
        return self._costs[Tier.HOST].curve(self._now()).per_byte_s
