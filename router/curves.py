"""What /admin/curves tells: the cost of each replica, link and tier as plans are priced now."""

from typing import Any

from kv.crossover import crossover_tokens
from kv.curve import LinkCurve
from router.fleet import Fleet
from router.member import Member


def curves_of(fleet: Fleet, points: bool = False) -> dict[str, Any]:
    """By replica, by link, and by replica and tier; with the samples that are kept, if asked.

    `samples` counts the requests that a curve was made from, beside what was measured at the start.
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
            member.name: {
                tier: _link(LinkCurve(told.latency_s, told.per_byte_s), told.samples, member)
                for tier, told in member.load.tiers.items()
            }
            for member in fleet.members()
            if member.load.tiers
        },
    }


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
        "bytes_per_s": None if link.per_byte_s == 0 else 1 / link.per_byte_s,
        "samples": samples,
        "crossover_tokens": None if crossover is None else round(crossover, 1),
    }
