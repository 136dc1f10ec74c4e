"""The plan against every plan there is: all five shapes, with each reach and each split of them.

What is compared with is reckoned one plan at a time, from DESIGN.md's formulas and the curves of a
snapshot; nothing of how the router prices many at once is used.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.fetch import GUESSES
from kv.plan import Plan, Reason, Shape, Source, Span
from router.columns import TIER_ORDER
from router.policy import split
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import ReplicaView, TierView
from tests.unit.router.test_router_split import BLOCK, TOKEN_BYTES, asked

PEER = GUESSES[Tier.PEER]
# The seconds of a sum depend on the order of its terms.
ROUNDING = 1e-9


class Cost(NamedTuple):
    """What a plan costs, and when its first token comes."""

    cost_s: float
    ttft_s: float


# A plan's shape, its prefill and decode replicas, and its spans.
Spans = tuple[Span, ...]
Every = tuple[Shape, ReplicaView | None, ReplicaView, Spans]


def tokens(span: Span) -> int:
    return span.end_token - span.start_token


def reaches(view: ReplicaView, n: int, block: int) -> Iterator[Spans]:
    """What a replica may have before it computes: its hit, and behind it of what its tiers hold
    nothing, or all up to some block. An engine takes each block from the first tier that has it."""
    hit = min(view.hit_tokens, n - 1)
    held = {tier.tier: min(tier.hit_tokens, n - 1) for tier in view.tiers}
    ends = {hit, *(end for end in held.values() if end > hit)}
    ends |= {at for at in range(0, max(ends), block) if at > hit}
    for end in sorted(ends):
        spans = [Span(Source.HIT, 0, hit, view.name)] if hit else []
        start = hit
        for tier in TIER_ORDER:
            stop = min(held.get(tier, 0), end)
            if stop > start:
                spans.append(Span(Source.FETCH, start, stop, view.name, tier))
                start = stop
        yield tuple(spans)


def every_plan(made: Question) -> Iterator[Every]:
    """All of all pairs."""
    n, snapshot = made.prompt_tokens, made.snapshot

    def computed(view: ReplicaView, before: Spans) -> Spans:
        start = before[-1].end_token if before else 0
        return (*before, Span(Source.COMPUTE, start, n, view.name))

    for d in snapshot.decode:
        for before in reaches(d, n, snapshot.block_tokens):
            fetches = any(span.source is Source.FETCH for span in before)
            yield Shape.FETCH if fetches else Shape.LOCAL, None, d, computed(d, before)
        for p in snapshot.prefill:
            for before in reaches(p, n, snapshot.block_tokens):
                fetches = any(span.source is Source.FETCH for span in before)
                shape = Shape.FETCH_REMOTE if fetches else Shape.REMOTE
                yield shape, p, d, computed(p, before)
            yield from ((Shape.SPLIT, p, d, spans) for spans in every_split(made, p, d))


def every_split(made: Question, p: ReplicaView, d: ReplicaView) -> Iterator[Spans]:
    """P computes at least a block behind what it has, and D fetches at least one, from one tier, as
    far as that reaches and D has room; or less far, where moving costs nobody but who waits: how
    far a split reaches is not weighed against what its bytes cost others."""
    n, block, room = made.prompt_tokens, made.snapshot.block_tokens, made.snapshot.room_tokens
    p_has, d_has = own(p, n), own(d, n)
    for tier in d.tiers:
        held = min(tier.hit_tokens, n - 1) // block * block
        if tier.tier is Tier.HOST or held - d_has > room[d.name]:
            continue
        hit = (Span(Source.HIT, 0, p_has, p.name),) if p_has else ()
        first = max(p_has, d_has) // block * block + block
        for m in range(first, held, block):
            for r in (held,) if made.moving_price else range(m + block, held + 1, block):
                yield (
                    *hit,
                    Span(Source.COMPUTE, p_has, m, p.name),
                    Span(Source.FETCH, m, r, d.name, tier.tier),
                    Span(Source.COMPUTE, r, n, d.name),
                )


def own(view: ReplicaView, n: int) -> int:
    """Tokens in a replica's paged KV and host tier."""
    host = max((tier.hit_tokens for tier in view.tiers if tier.tier is Tier.HOST), default=0)
    return min(max(view.hit_tokens, host), n - 1)


def own_s(view: ReplicaView, n: int) -> float:
    """Seconds to take the latter's out of there."""
    more = own(view, n) - min(view.hit_tokens, n - 1)
    return curve_of(view, Tier.HOST).seconds(more * TOKEN_BYTES) if more else 0.0


def curve_of(view: ReplicaView, tier: Tier | None) -> LinkCurve:
    return next(each.curve for each in view.tiers if each.tier is tier)


def cost(made: Question, plan: Every) -> Cost:
    """Of any of them, by its spans."""
    shape, p, d, spans = plan
    if shape is Shape.SPLIT:
        assert p is not None
        return split_cost(made, p, d, spans)
    n, by, price = made.prompt_tokens, p or d, made.compute_price
    moving = made.moving_price
    fetches = (span for span in spans if span.source is Source.FETCH)
    fetch_s = sum(curve_of(by, each.tier).seconds(tokens(each) * TOKEN_BYTES) for each in fetches)
    last = spans[-1]
    compute_s = by.curve.seconds(tokens(last), last.start_token)
    ttft_s = by.queue_s + fetch_s + compute_s
    if p is None:
        stalled_s = max(d.running, made.assumed_streams) * compute_s
        charged_s = price * compute_s + moving * fetch_s
        return Cost(ttft_s + stalled_s + charged_s + d.crowding_s, ttft_s)
    lacked_bytes = (n - min(d.hit_tokens, n - 1)) * TOKEN_BYTES
    handoff_s = made.snapshot.links[p.name, d.name].seconds(lacked_bytes)
    ttft_s += handoff_s + d.waiting * d.step_s
    charged_s = price * compute_s + moving * (fetch_s + handoff_s)
    return Cost(ttft_s + charged_s + d.crowding_s, ttft_s)


def split_cost(made: Question, p: ReplicaView, d: ReplicaView, spans: Spans) -> Cost:
    """Both sides at once; then D computes the rest, beside its streams."""
    n, price = made.prompt_tokens, made.compute_price
    *_, head, tail, rest = spans
    compute_s = p.curve.seconds(tokens(head), head.start_token)
    moved = head.end_token - own(d, n)
    handoff_s = PEER.seconds(moved * TOKEN_BYTES)
    fetch_s = curve_of(d, tail.tier).seconds(tokens(tail) * TOKEN_BYTES)
    moving_s = handoff_s + fetch_s + own_s(p, n) + own_s(d, n)
    head_s = p.queue_s + own_s(p, n) + compute_s + handoff_s
    tail_s = d.queue_s + fetch_s
    rest_s = own_s(d, n) + d.curve.seconds(tokens(rest), rest.start_token)
    ttft_s = max(head_s, tail_s) + rest_s
    stalled_s = (price + max(d.running, made.assumed_streams)) * rest_s
    charged_s = price * compute_s + made.moving_price * moving_s
    return Cost(ttft_s + stalled_s + charged_s + d.crowding_s, ttft_s)


def as_one(made: Question, plan: Plan) -> Every:
    """A plan that was made, as one of all."""
    views = {view.name: view for view in (*made.snapshot.prefill, *made.snapshot.decode)}
    p = None if plan.prefill is None else views[plan.prefill]
    return plan.shape, p, views[plan.decode], plan.spans


# Fetching from as fast as computing to four times as slow or as fast, so that each shape is the
# best one of many; few blocks, so that all plans can be tried.
MOST = 8
BLOCKS = st.integers(0, MOST).map(lambda blocks: blocks * BLOCK)
FEW = st.sampled_from([0, 0, 0, BLOCK, 3 * BLOCK])
LINKS = st.builds(LinkCurve, st.floats(0.0, 0.1), st.floats(2.5e-9, 8e-8))
CURVES = st.builds(PrefillCurve, st.floats(0.0, 0.1), st.floats(0.001, 0.004), st.floats(0.0, 1e-5))
PROMPTS = st.integers(1, MOST * BLOCK + 1) | st.integers(6 * BLOCK, MOST * BLOCK + BLOCK)


@st.composite
def replicas(draw: st.DrawFn) -> dict[str, object]:
    held = [
        TierView(Tier.HOST, draw(LINKS), draw(FEW)),
        TierView(Tier.DISK, draw(LINKS), draw(FEW)),
        TierView(Tier.VAULT, draw(LINKS), draw(BLOCKS)),
    ]
    return {
        "curve": draw(CURVES),
        "hit_tokens": draw(FEW),
        "queued_tokens": draw(st.sampled_from([0, 0, 40, 200])),
        "waiting": draw(st.integers(0, 1)),
        "running": draw(st.integers(0, 3)),
        "tiers": tuple(view for view in held if view.hit_tokens),
    }


POOLS = st.lists(replicas(), min_size=1, max_size=2)
SOME_POOLS = st.lists(replicas(), max_size=2)
# Links that cost more than waiting for them turn what is best at a split round.
PRICES = st.just(0.0) | st.floats(0.0, 0.5) | st.floats(0.0, 5.0)
ROOMS = st.sampled_from([0, 4 * BLOCK, MOST * BLOCK])
# One in three of these is split: fetching is about as fast as computing.
EVEN = st.builds(LinkCurve, st.floats(0.0, 0.02), st.floats(1.5e-8, 3e-8))
HOLDERS = st.builds(
    lambda link, curve: {"tiers": (TierView(Tier.VAULT, link, MOST * BLOCK),), "curve": curve},
    EVEN,
    CURVES,
)
OTHERS = st.lists(replicas(), max_size=1)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    if draw(st.booleans()):
        prefill, decode, room = draw(SOME_POOLS), draw(POOLS), draw(ROOMS)
    else:
        prefill = [{"curve": draw(CURVES)}, *draw(OTHERS)]
        decode, room = [draw(HOLDERS), *draw(OTHERS)], MOST * BLOCK
    prices = {name: draw(PRICES) for name in ("compute_price", "moving_price")}
    made = asked(draw(PROMPTS), prefill, decode, room, **prices)
    links = {pair: draw(LINKS) for pair in made.snapshot.links}
    return replace(made, snapshot=replace(made.snapshot, links=links))


@settings(max_examples=200)
@given(questions())
def test_no_plan_costs_less_than_the_one_that_is_made(made: Question) -> None:
    """By its own curves: nothing that is not split costs less, and no split by more than what a
    split has to gain, be it at another block, from another tier or of a shorter reach, where
    `every_split` says."""
    plan = choose(made)
    event(plan.shape)
    priced = [(cost(made, each).cost_s, each[0]) for each in every_plan(made)]
    whole_s = min(seconds for seconds, shape in priced if shape is not Shape.SPLIT)
    assert plan.cost_s <= whole_s * (1.0 + ROUNDING)
    divided_s = min((each for each, shape in priced if shape is Shape.SPLIT), default=None)
    if divided_s is not None and plan.cost_s > split.LEAST_COST_S:
        assert plan.cost_s * (1.0 - split.LEAST_GAIN) <= divided_s * (1.0 + ROUNDING)
    if plan.shape is Shape.SPLIT:
        assert plan.cost_s <= whole_s * (1.0 - split.LEAST_GAIN)


@given(questions())
def test_what_a_plan_says_is_what_its_spans_cost(made: Question) -> None:
    """Its cost and its time to the first token are those of its spans, reckoned by themselves; so
    are the rivals' those of some plan of their shape and pair."""
    plan = choose(made)
    assert tuple(cost(made, as_one(made, plan))) == pytest.approx(
        (plan.cost_s, plan.predicted_ttft_s)
    )
    assert sum(map(tokens, plan.spans)) == made.prompt_tokens
    others: dict[tuple[Shape, str | None, str], list[Cost]] = {}
    for each in every_plan(made):
        at = each[0], each[1] and each[1].name, each[2].name
        others.setdefault(at, []).append(cost(made, each))
    for rival in plan.rivals:
        costs = others[rival.shape, rival.prefill, rival.decode]
        told = rival.cost_s, rival.predicted_ttft_s
        assert any(told == pytest.approx(tuple(each)) for each in costs)


@pytest.mark.parametrize("shape", Shape)
def test_every_shape_is_the_best_one_of_some(shape: Shape) -> None:
    """The cases above try each of them."""
    slow, fast = LinkCurve(0.02, 5e-8), LinkCurve(0.01, 1e-9)
    n, busy = MOST * BLOCK + 1, {"running": 9}
    held: dict[Shape, tuple[list[Any], list[Any]]] = {
        Shape.LOCAL: ([], [{}]),
        Shape.REMOTE: ([{}], [busy]),
        Shape.FETCH: ([{}], [{"tiers": (TierView(Tier.VAULT, fast, n - 1),)}]),
        Shape.FETCH_REMOTE: ([{"tiers": (TierView(Tier.VAULT, fast, n - 65),)}], [busy]),
        Shape.SPLIT: ([{}], [{"tiers": (TierView(Tier.VAULT, slow, n - 1),)}]),
    }
    prefill, decode = held[shape]
    curve = PrefillCurve(0.01, 0.004, 1e-6)
    prefill, decode = ([{**each, "curve": curve} for each in pool] for pool in (prefill, decode))
    made = asked(n, prefill, decode)
    plan = choose(made)
    assert plan.shape is shape
    assert min(every_plan(made), key=lambda each: cost(made, each).cost_s)[0] is shape
    assert (plan.reason is Reason.OVERLAP) is (shape is Shape.SPLIT)
