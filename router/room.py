"""Whether the next batch request is begun now or waits.

Engines let urgent requests go first (`workers.give_way`), so that what is decided here need not be
exact: it keeps batch requests where they hold nothing, until somebody has time for them.
"""

from dataclasses import dataclass
from enum import StrEnum

from router.settings import BatchBounds

# Prompts of batch requests that a replica may have at a time: one that it computes, and the next.
PROMPTS_EACH = 2
# Of paged KV in use: beyond this share a request that comes may take another's pages.
MOST_KV = 0.9


class Why(StrEnum):
    """Why a batch request is begun, or waits."""

    ROOM = "room"  # begun: a replica has time for it
    AGE = "age"  # begun, as urgent as any: it has waited as long as it may
    NOBODY = "nobody"  # begun: no replica is up, which is its answer
    PROMPTS = "prompts"  # waits: every replica that computes has a prompt of somebody who waits
    BATCH_PROMPTS = "batch_prompts"  # waits: replicas have as many batch prompts as they may
    SEATS = "seats"  # waits: decode replicas have as many streams as batch requests may add to
    KV = "kv"  # waits: paged KV is nearly all in use, or batch requests hold their share of it


@dataclass(frozen=True, slots=True)
class Crowd:
    """What an ingress knows of the load, in requests.

    `computing` replicas compute prompts. `urgent_prompts` of people, and `batch_prompts`, have yet
    to get a first token. `streams`, of either class, are on decode replicas with `seats` in all,
    of which the emptiest has `kv_usage` of its paged KV in use. Of all their paged KV batch
    requests hold a share of `batch_kv`, and the next one needs `next_kv`. `old_prompts` were begun
    by their age, and have yet to get a first token.
    """

    computing: int
    urgent_prompts: int
    batch_prompts: int
    streams: int
    seats: int
    kv_usage: float
    batch_kv: float = 0.0
    next_kv: float = 0.0
    old_prompts: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Whether a request is `begun`."""

    begun: bool
    why: Why


def decide(crowd: Crowd, waited_s: float, bounds: BatchBounds) -> Turn:
    """For the batch request that has waited longest, `waited_s`."""
    if not crowd.computing:
        return Turn(True, Why.NOBODY)
    # Those that came together are old together, and all at once they would be a wall to people.
    # On an engine one is as urgent as any, however much room there was for it.
    if waited_s >= bounds.max_age_s:
        next_one = crowd.old_prompts < crowd.computing
        return Turn(True, Why.AGE) if next_one else Turn(False, Why.BATCH_PROMPTS)
    idle = crowd.computing - crowd.urgent_prompts
    if idle < 1:
        return Turn(False, Why.PROMPTS)
    if crowd.batch_prompts >= PROMPTS_EACH * idle:
        return Turn(False, Why.BATCH_PROMPTS)
    # Whatever the share, an empty cluster has room for one.
    if crowd.streams and crowd.streams + 1 > bounds.seats * crowd.seats:
        return Turn(False, Why.SEATS)
    if crowd.streams and crowd.kv_usage > MOST_KV:
        return Turn(False, Why.KV)
    if crowd.batch_kv and crowd.batch_kv + crowd.next_kv > bounds.kv:
        return Turn(False, Why.KV)
    return Turn(True, Why.ROOM)
