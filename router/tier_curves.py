"""What fetching from tiers is taken to cost: what a replica tells, or what those like it knew.

A replica that starts tells guesses. Until it has fetched as often as it takes to tell a level from
an outlier, it is priced by what others of its hardware knew last, in this cluster or before, if
that is less: a tier that was slow then would not be tried again, and nobody would learn that it is
fast.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES, TYPICAL_BYTES
from kv.refit import SHIFT_AFTER
from router.curve_book import LEAST_SAMPLES, KeptLink
from router.member import Member
from workers.messages import FetchLoad, LossyLoad, Replica, TierLoad

Kept = Mapping[str, KeptLink]
Told = TierLoad | FetchLoad | LossyLoad
_T = TypeVar("_T", TierLoad, FetchLoad, LossyLoad)


def tiers_of(
    replica: Replica, told: Mapping[Tier, TierLoad], kept: Kept
) -> Mapping[Tier, TierLoad]:
    """What a replica told of its tiers, at the costs that plans go by."""
    if not kept or all(map(_knows, told.values())):
        return told
    return {tier: _tier(replica.hardware, tier, each, kept) for tier, each in told.items()}


def peer_of(replica: Replica, told: FetchLoad | None, kept: Kept) -> FetchLoad:
    """What blocks cost it that another replica lends."""
    guess = GUESSES[Tier.PEER]
    known = told or FetchLoad(guess.latency_s, guess.per_byte_s)
    return _known(known, _of_kind(kept, replica.hardware, Tier.PEER))


def curve_of(told: Told) -> LinkCurve:
    """As a curve."""
    return LinkCurve(told.latency_s, told.per_byte_s)


def worth_keeping(members: Iterable[Member]) -> dict[str, KeptLink]:
    """By hardware and tier, what that replica tells which has fetched most often."""
    kept: dict[str, KeptLink] = {}
    for member in members:
        if not member.replica.hardware:
            continue
        for kind, told in _kinds(member):
            enough = max(LEAST_SAMPLES, kept[kind].samples if kind in kept else 0)
            if told.samples >= enough:
                kept[kind] = KeptLink(told.latency_s, told.per_byte_s, told.samples)
    return kept


def _kinds(member: Member) -> Iterator[tuple[str, Told]]:
    hardware, load = member.replica.hardware, member.load
    for tier, told in load.tiers.items():
        yield _kind(hardware, tier), told
        if told.lossy is not None:
            yield _kind(hardware, tier, told.lossy), told.lossy
    if load.peer is not None:
        yield _kind(hardware, Tier.PEER), load.peer


def _tier(hardware: str, tier: Tier, told: TierLoad, kept: Kept) -> TierLoad:
    found, lossy = _known(told, _of_kind(kept, hardware, tier)), told.lossy
    if lossy is None:
        return found
    lossy = _known(lossy, _of_kind(kept, hardware, tier, lossy))
    return msgspec.structs.replace(found, lossy=lossy)


def _knows(told: TierLoad) -> bool:
    return told.samples >= SHIFT_AFTER and told.lossy is None


def _known(told: _T, kept: KeptLink | None) -> _T:
    if kept is None or told.samples >= SHIFT_AFTER:
        return told
    cheaper = LinkCurve(kept.latency_s, kept.per_byte_s).seconds(TYPICAL_BYTES)
    if curve_of(told).seconds(TYPICAL_BYTES) <= cheaper:
        return told
    return msgspec.structs.replace(told, latency_s=kept.latency_s, per_byte_s=kept.per_byte_s)


def _of_kind(
    kept: Kept, hardware: str, tier: Tier, lossy: LossyLoad | None = None
) -> KeptLink | None:
    """None for a replica that does not say what it runs on: nobody is like it."""
    return kept.get(_kind(hardware, tier, lossy)) if hardware else None


def _kind(hardware: str, tier: Tier, lossy: LossyLoad | None = None) -> str:
    """Tiers of one kind cost alike; a codec is known by what it leaves of a page."""
    return f"{hardware}, {tier}" + ("" if lossy is None else f", to {lossy.share:.3f} of a page")
