"""Which other replica may lend the prefix that a plan computes.

A replica's host tier takes a copy of what its paged KV holds, so the longer of the two is what it
may lend. Plans are chosen as if there were no peers: what one lends is a gain beside the plan, and
costs no more than computing would have taken, since the engine waits for it no longer than that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kv.catalogue import Tier
from router.columns import (
    PEER_LATENCY_S,
    PEER_PER_BYTE_S,
    PER_TOKEN2_S,
    PER_TOKEN_S,
    Columns,
    Floats,
    Lending,
)


@dataclass(frozen=True, slots=True)
class Lender:
    """Where a replica lends its blocks, how far into the prompt they reach, and the seconds that
    computing those would take that the borrower lacks."""

    address: str
    reach_tokens: int
    saved_s: float


def lender(
    columns: Columns,
    addresses: Mapping[str, str],
    borrower: int,
    lacks_from: int,
    prompt_tokens: int,
    token_bytes: int,
) -> Lender | None:
    """Who has the most of a prompt that the replica at place `borrower` lacks from `lacks_from` on;
    None where nobody has more, or fetching it would take longer than computing.

    `addresses` are those of replicas that lend, by name.
    """
    lends = (columns.lending or Lending.of(columns.names, addresses, {})).lends
    if not lends[borrower]:
        return None
    held = np.where(lends, np.minimum(_held(columns), prompt_tokens - 1), -1.0)
    held[borrower] = -1.0
    place = int(held.argmax())
    reach = int(held[place])
    span = reach - lacks_from
    saved_s = float(
        columns.loads[PER_TOKEN_S, borrower] * span
        + columns.loads[PER_TOKEN2_S, borrower] * (reach**2 - lacks_from**2)
    )
    latency_s, per_byte_s = columns.loads[[PEER_LATENCY_S, PEER_PER_BYTE_S], borrower]
    if span <= 0 or latency_s + per_byte_s * span * token_bytes >= saved_s:
        return None
    return Lender(addresses[columns.names[place]], reach, saved_s)


def _held(columns: Columns) -> Floats:
    """Leading tokens of the prompt in each replica's paged KV or host tier."""
    tiers = columns.tiers
    if tiers is None or Tier.HOST not in tiers.order:
        return columns.hit_tokens
    held: Floats = np.maximum(columns.hit_tokens, tiers.tokens[tiers.order.index(Tier.HOST)])
    return held
