"""What /admin/curves tells: the cost of each replica, link and tier as plans are priced now."""

from typing import Any

from kv.catalogue import Tier
from kv.crossover import crossover_tokens
from kv.curve import LinkCurve
from router.fleet import Fleet
from router.member import Member
from router.tier_curves import curve_of
from workers.messages import FetchLoad, TierLoad


def curves_of(fleet: Fleet, points: bool = False) -> dict[str, Any]:
    """By replica, by link, and by replica and tier; with the samples that are kept, if asked.

    `samples` counts the requests that a curve was made from, beside what was measured at the start.
    A vault's are those of whoever on the node used it last, by whose curve all there are planned.
    What a tier costs whose blocks a lossy codec made smaller is under `lossy`, and what blocks cost
    that others lend under the tier `peer`.
    `crossover_tokens` is the prefix from which on fetching it there costs its receiver no more than
    computing it; null where no prefix is long enough.
    """
    return {
        "prefill": {member.name: _prefill(fleet, member, points) for member in fleet.members()},
        "links": {
            f"{source}->{destination}": _pair(fleet, (source, destination), link, points)
            for (source, destination), link in fleet.pairs.links.items()
        },
        "tiers": {
            member.name: _tiers(fleet, member, points)
            for member in fleet.members()
            if member.load.tiers
        },
    }


def _tiers(fleet: Fleet, member: Member, points: bool) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for tier, told in fleet.tiers_of(member).items():
        rows[tier] = _tier(told, member, points)
        if told.lossy is not None:
            rows[tier]["lossy"] = _tier(told.lossy, member, points)
    if member.replica.peer_address:
        rows[Tier.PEER] = _tier(fleet.peer_of(member), member, points)
    return rows


def _tier(told: TierLoad | FetchLoad, member: Member, points: bool) -> dict[str, Any]:
    row = _link(curve_of(told), told.samples, member)
    if points:
        row["points"] = [list(point) for point in told.seen]
    return row


def _prefill(fleet: Fleet, member: Member, points: bool) -> dict[str, Any]:
    curve, live = member.speed.curve, fleet.speeds.live(member.replica)
    row: dict[str, Any] = {
        "base_s": curve.base_s,
        "per_token_s": curve.per_token_s,
        "per_token2_s": curve.per_token2_s,
        "step_s": member.speed.step_s,
        "samples": 0 if live is None else live.samples,
        "shifts": 0 if live is None else live.shifts,
    }
    if points:
        row["points"] = [] if live is None else live.seen()
    return row


def _pair(fleet: Fleet, pair: tuple[str, str], link: LinkCurve, points: bool) -> dict[str, Any]:
    live = fleet.pairs.live(pair)
    samples = 0 if live is None else live.samples
    row = _link(link, samples, fleet.member(pair[1]))
    row["shifts"] = 0 if live is None else live.shifts
    if points:
        row["points"] = [] if live is None else live.seen()
    return row


def _link(link: LinkCurve, samples: int, receiver: Member | None) -> dict[str, Any]:
    crossover = None
    if receiver is not None:
        token_bytes = receiver.replica.kv_bytes_per_token
        crossover = crossover_tokens(receiver.speed.curve, link, token_bytes)
    return {
        "latency_s": link.latency_s,
        "bytes_per_s": link.bytes_per_s,
        "samples": samples,
        "crossover_tokens": None if crossover is None else round(crossover, 1),
    }
