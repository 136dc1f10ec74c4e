"""Whether to split a prompt: P computes its head [0, m) while D fetches the tail [m, r).

D takes the head out of P's host tier as it is computed, the tail from a tier of its own or the
vault, and computes what lies behind r itself. The tail was computed behind the same head, so the
answer is that of any other plan. Decoding starts when both sides are in: `max(head + handoff,
tail)` is down to half of the better of the two.

All pairs whose D could fetch a tail are looked at in one pass for each tier (`kv.split`). A head is
priced as if its last byte left when its last token was computed; its blocks leave as they are
computed, so it is there a little sooner.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kv.catalogue import Tier
from kv.parts import Action, Part, in_turn
from kv.plan import Hints, Plan, Reason, Rival, Shape, Source, Span
from kv.split import Sides, best_split
from router.columns import (
    BASE_S,
    OWN_S,
    PEER_LATENCY_S,
    PEER_PER_BYTE_S,
    PER_TOKEN2_S,
    PER_TOKEN_S,
    QUEUE_S,
    RUNNING,
    Columns,
    Displaced,
    Floats,
    Lending,
    TierColumns,
)
from router.policy.question import Question

# A split has to be cheaper by this ratio. It keeps two replicas busy and stands on two predictions,
# whose median error is to be 15 % each: a lesser gain may as well be a loss.
LEAST_GAIN = 0.15
# Plans that cost no more are not split: blocks on their way are asked for every 20 ms, and come
# an engine's step later.
LEAST_COST_S = 0.1
# A side may in any case take so long before it is given up: a head that is predicted to take no
# time may wait for a step.
LEAST_PATIENCE_S = 0.25
# Between sums of the same numbers.
_ROUNDING = 1e-9


class Split(NamedTuple):
    """One split. The pair's places are among all replicas; the head is what P computes behind its
    own `hit_tokens`, the tail what D takes from `tier` up to `reach_tokens`; the same tier would
    bring the head in `refetch_s`. Both sides are in at D after `in_s`."""

    decode: int
    prefill: int
    tier: Tier
    hit_tokens: int
    split_tokens: int
    reach_tokens: int
    head_s: float
    in_s: float
    refetch_s: float
    ttft_s: float
    cost_s: float


class _Ends(NamedTuple):
    """Whom pairs are made of. `decode` and `prefill` are places; by place: the tokens that paged KV
    and host tier hold, the seconds to take the latter's out of there, and what the whole prompt
    would displace. By decode replica: how many tokens it has room for. By prefill replica: what a
    head costs there."""

    decode: NDArray[np.intp]
    prefill: NDArray[np.intp]
    has_tokens: Floats
    own_s: Floats
    pushed_s: Floats
    room_tokens: Floats
    heads: "_Heads"

    def only(self, some: NDArray[np.bool_]) -> "_Ends":
        """With some of the decode replicas."""
        return self._replace(decode=self.decode[some], room_tokens=self.room_tokens[some])


class _Heads(NamedTuple):
    """A head up to token m on each of some prefill replicas: it begins behind `has_tokens`, takes
    `begin_s + per_token_s * m + per_token2_s * m^2` seconds there, and displaces
    `pushed_per_token_s * m`; what that is too much, and what is moved there, is in
    `charged_s`."""

    has_tokens: Floats
    begin_s: Floats
    per_token_s: Floats
    per_token2_s: Floats
    pushed_per_token_s: Floats
    charged_s: Floats

    def ideal(self) -> "_Heads":
        """Of one replica that is nowhere worse than any of these."""
        return _Heads(*(each.min(keepdims=True) for each in self))


class _Priced(NamedTuple):
    """All splits whose tails come from one tier, (decode, prefill) replicas, but `reach_tokens` and
    `rest_s` by decode replica. The cost is infinite where a pair cannot split."""

    sides: Sides
    at: Floats
    cost_s: Floats
    reach_tokens: Floats
    rest_s: Floats


def better(
    question: Question, columns: Columns, cost_s: float, decode: str | None = None
) -> Split | None:
    """The cheapest split, if it costs enough less than the best other plan, which costs `cost_s`;
    of one `decode` replica only, if it is named."""
    snapshot, tiers = question.snapshot, columns.tiers
    if question.local_only or not question.may_split or snapshot.blind:
        return None
    if not snapshot.peers or not snapshot.block_tokens:
        return None
    if tiers is None or cost_s <= LEAST_COST_S:
        return None
    ends = _ends(question, columns, tiers, decode)
    if not (ends.decode.size and ends.prefill.size):
        return None
    found: Split | None = None
    limit_s = cost_s * (1.0 - LEAST_GAIN)
    for place, tier in enumerate(tiers.order):
        if tier is Tier.HOST:
            continue
        those = _promising(question, columns.loads, tiers, ends, place, limit_s)
        if those.decode.size:
            split = _cheapest(question, columns.loads, tiers, those, place)
            if split.cost_s < limit_s:
                found, limit_s = split, split.cost_s
    return found


def _promising(
    question: Question, loads: Floats, tiers: TierColumns, ends: _Ends, place: int, limit_s: float
) -> _Ends:
    """Without the decode replicas that could get nothing more from the tier at `place`, and those
    whose splits cost `limit_s` or more with the best head that there could be: pricing one such
    pair for each takes half as long as all pairs."""
    those = ends.only(tiers.tokens[place, ends.decode] > ends.has_tokens[ends.decode])
    if not those.decode.size:
        return those
    ideal = _priced(question, loads, tiers, those, place, those.heads.ideal())
    return those.only(ideal.cost_s[:, 0] < limit_s * (1.0 + _ROUNDING))


def plan(question: Question, columns: Columns, split: Split, rivals: tuple[Rival, ...]) -> Plan:
    """The plan of a split: its spans are on two replicas."""
    d, p = columns.names[split.decode], columns.names[split.prefill]
    h, m, r = split.hit_tokens, split.split_tokens, split.reach_tokens
    hit = (Span(Source.HIT, 0, h, p),) if h else ()
    head, tail = Span(Source.COMPUTE, h, m, p), Span(Source.FETCH, m, r, d, split.tier)
    return Plan(
        shape=Shape.SPLIT,
        reason=Reason.OVERLAP,
        prefill=p,
        decode=d,
        spans=(*hit, head, tail, Span(Source.COMPUTE, r, question.prompt_tokens, d)),
        predicted_ttft_s=split.ttft_s,
        cost_s=split.cost_s,
        rivals=rivals,
        hints=_hints(question, columns, split),
        parts=_parts(columns, split),
    )


def _parts(columns: Columns, split: Split) -> tuple[Part, ...]:
    """P's seconds, the head's way to D included, beside D's, whose fetch ends when both are in."""
    d, p = columns.names[split.decode], columns.names[split.prefill]
    d_queue_s, p_queue_s = (
        float(columns.loads[QUEUE_S, at]) for at in (split.decode, split.prefill)
    )
    head = (Action.QUEUE, p, p_queue_s), (Action.COMPUTE, p, split.head_s - p_queue_s)
    tail = (Action.QUEUE, d, d_queue_s), (Action.FETCH, d, split.in_s - d_queue_s)
    rest = (Action.COMPUTE, d, split.ttft_s - split.in_s)
    return (*in_turn(head), *in_turn((*tail, rest)))


def _hints(question: Question, columns: Columns, split: Split) -> Hints:
    """D's. The head is waited for until it is surely late, then for as long as the tail's tier may
    take to bring it instead, or as computing all of it would."""
    head_deadline_s = LEAST_PATIENCE_S + question.overrun * split.head_s
    d, reach = split.decode, float(split.reach_tokens)
    held = np.minimum(columns.hit_tokens[d : d + 1], reach)
    computing_s = float(_compute_s(columns.loads[:, d : d + 1], reach, held)[0])
    instead_s = min(question.overrun * split.refetch_s, computing_s)
    return Hints(
        reach_tokens=split.reach_tokens,
        tiers=(split.tier,),
        deadline_s=head_deadline_s + LEAST_PATIENCE_S + instead_s,
        peer=question.snapshot.peers[columns.names[split.prefill]],
        head_tokens=split.split_tokens,
        head_deadline_s=head_deadline_s,
    )


def _ends(question: Question, columns: Columns, tiers: TierColumns, decode: str | None) -> _Ends:
    """Both need the peer tier, and D room for what it takes in."""
    snapshot, names, n_decode = question.snapshot, columns.names, columns.n_decode
    lending = columns.lending or Lending.of(names, snapshot.peers, snapshot.room_tokens)
    takes = lending.room_tokens[:n_decode] > 0.0
    if decode is not None:
        takes &= np.array([name == decode for name in names[:n_decode]])
    ds, ps = np.flatnonzero(takes), np.flatnonzero(lending.lends[n_decode:]) + n_decode
    hit = has = np.minimum(columns.hit_tokens, question.prompt_tokens - 1)
    own_s = np.zeros(len(names))
    if Tier.HOST in tiers.order:
        host = tiers.order.index(Tier.HOST)
        more = np.maximum(np.minimum(tiers.tokens[host], question.prompt_tokens - 1) - has, 0.0)
        moving_s = tiers.per_byte_s[host] * more * snapshot.kv_bytes_per_token
        own_s = np.where(more > 0.0, tiers.latency_s[host] + moving_s, 0.0)
        has = has + more
    pushed_s, per_token_s = _pushed(question, columns.displaced, question.prompt_tokens - hit)
    heads = _heads(question, columns.loads[:, ps], has[ps], own_s[ps], per_token_s[ps], hit[ps])
    return _Ends(ds, ps, has, own_s, pushed_s, lending.room_tokens[ds], heads)


def _heads(
    question: Question,
    loads: Floats,
    has_tokens: Floats,
    own_s: Floats,
    pushed_per_token_s: Floats,
    hit_tokens: Floats,
) -> _Heads:
    """Of prefill replicas with these columns."""
    computing_s = _compute_s(loads, 0.0, has_tokens)
    return _Heads(
        has_tokens,
        loads[QUEUE_S] + own_s + computing_s,
        loads[PER_TOKEN_S],
        loads[PER_TOKEN2_S],
        pushed_per_token_s,
        question.compute_price * computing_s
        - pushed_per_token_s * hit_tokens
        + question.moving_price * own_s,
    )


def _pushed(
    question: Question, displaced: Displaced | None, new_tokens: Floats
) -> tuple[Floats, Floats]:
    """Seconds by place that the whole prompt displaces, and that each token of it does: none where
    there is room for all, of a part as if there were no room at all."""
    if displaced is None:
        return np.zeros(len(new_tokens)), np.zeros(len(new_tokens))
    pushed_s = question.displaced_price * displaced.seconds(new_tokens)
    return pushed_s, np.where(pushed_s > 0.0, question.displaced_price * displaced.per_token_s, 0.0)


def _cheapest(
    question: Question, loads: Floats, tiers: TierColumns, ends: _Ends, place: int
) -> Split:
    """The cheapest split whose tail comes from the tier at `place`."""
    priced = _priced(question, loads, tiers, ends, place, ends.heads)
    i, j = divmod(int(priced.cost_s.argmin()), len(ends.prefill))
    d, p = int(ends.decode[i]), int(ends.prefill[j])
    head_s = float(priced.sides.head(priced.at)[i, j])
    in_s = max(head_s, float(priced.sides.tail(priced.at)[i, j]))
    head_bytes = (priced.at[i, j] - ends.has_tokens[d]) * question.snapshot.kv_bytes_per_token
    return Split(
        decode=d,
        prefill=p,
        tier=tiers.order[place],
        hit_tokens=int(ends.has_tokens[p]),
        split_tokens=int(priced.at[i, j]),
        reach_tokens=int(priced.reach_tokens[i]),
        head_s=head_s,
        in_s=in_s,
        refetch_s=float(tiers.latency_s[place, d] + tiers.per_byte_s[place, d] * head_bytes),
        ttft_s=in_s + float(priced.rest_s[i]),
        cost_s=float(priced.cost_s[i, j]),
    )


def _priced(
    question: Question,
    loads: Floats,
    tiers: TierColumns,
    ends: _Ends,
    place: int,
    heads: _Heads,
) -> _Priced:
    n, block, price = question.prompt_tokens, question.snapshot.block_tokens, question.compute_price
    of_d, has_d = loads[:, ends.decode], ends.has_tokens[ends.decode]
    reach = np.floor(np.minimum(tiers.tokens[place, ends.decode], n - 1) / block) * block
    sides = _sides(question, of_d, tiers, ends, place, reach, heads)
    # At least a block is computed by P, and a block fetched.
    low = np.floor(np.maximum(has_d[:, None], heads.has_tokens) / block) * block + block
    high = (reach - block)[:, None]
    at = best_split(sides, low, high, block)
    rest_s = _compute_s(of_d, n, reach) + ends.own_s[ends.decode]
    # Streams on D stall while it computes the rest.
    weight = 1.0 + price + np.maximum(of_d[RUNNING], question.assumed_streams)
    beside_s = weight * rest_s + of_d[OWN_S] - of_d[QUEUE_S]
    beside_s += ends.pushed_s[ends.decode]
    if question.moving_price:
        # What would move if the split were at token 0; the sides charge for where it is.
        tail_s, handoff_s = sides.tail_s[:, 0] - of_d[QUEUE_S], (sides.head_s - heads.begin_s)[:, 0]
        beside_s += question.moving_price * (tail_s + handoff_s + ends.own_s[ends.decode])
    cost_s = sides.cost(at) + beside_s[:, None] + heads.charged_s
    cost_s[(low > high) | (reach - has_d > ends.room_tokens)[:, None]] = np.inf
    return _Priced(sides, at, cost_s, reach, rest_s)


def _sides(
    question: Question,
    of_d: Floats,
    tiers: TierColumns,
    ends: _Ends,
    place: int,
    reach: Floats,
    heads: _Heads,
) -> Sides:
    """Seconds as the split moves; the tail's begin behind what D computes for others."""
    d, token_bytes = ends.decode, question.snapshot.kv_bytes_per_token
    peer_s, price = of_d[PEER_PER_BYTE_S] * token_bytes, question.compute_price
    tier_s = (tiers.per_byte_s[place, d] * token_bytes)[:, None]
    handoff_s = of_d[PEER_LATENCY_S] - peer_s * ends.has_tokens[d]
    tail_s = of_d[QUEUE_S] + tiers.latency_s[place, d]
    price_per_token_s = price * heads.per_token_s + heads.pushed_per_token_s
    if question.moving_price:
        # A token more of the head comes over the peer's link rather than out of the tier.
        price_per_token_s = price_per_token_s + question.moving_price * (peer_s[:, None] - tier_s)
    return Sides(
        head_s=heads.begin_s + handoff_s[:, None],
        head_per_token_s=heads.per_token_s + peer_s[:, None],
        head_per_token2_s=heads.per_token2_s,
        tail_s=tail_s[:, None] + tier_s * reach[:, None],
        tail_per_token_s=tier_s,
        price_per_token_s=price_per_token_s,
        price_per_token2_s=price * heads.per_token2_s,
    )


def _compute_s(loads: Floats, end: "int | float | Floats", behind: Floats) -> Floats:
    """Seconds to prefill from `behind` to `end`; from token 0, less what it takes to get `behind`,
    where that comes first."""
    seconds: Floats = loads[BASE_S] + loads[PER_TOKEN_S] * (end - behind)
    seconds += loads[PER_TOKEN2_S] * (end * end - behind * behind)
    return seconds
