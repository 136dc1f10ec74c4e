"""When a prompt is split, where, and what the engines are told."""

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.fetch import GUESSES
from kv.parts import Action
from kv.plan import Plan, Reason, Shape, Source, Span
from router.columns import Columns
from router.policy import split
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import ReplicaView, TierView
from tests.unit.router.test_router_tiers import question

TOKEN_BYTES, BLOCK = 100_000, 32
# About as fast as the default curve computes: 1,024 tokens take 0.5 s.
EVEN = LinkCurve(0.02, 5e-9)
ANYTHING_S = 1e9  # any split costs less
PEER = GUESSES[Tier.PEER]
ADDRESSES = {"prefill": "tcp://10.0.0.1:%d", "decode": "tcp://10.0.0.2:%d"}


def vault(tokens: int, curve: LinkCurve = EVEN, host: int = 0) -> dict[str, object]:
    held = TierView(Tier.HOST, LinkCurve(0.005, 5e-11), host)
    return {"tiers": (held, TierView(Tier.VAULT, curve, tokens))}


def asked(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    room_tokens: int = 100_000,
    **more: Any,
) -> Question:
    """Everybody lends."""
    made = question(prompt_tokens, prefill, decode, **more)
    names = [view.name for view in (*made.snapshot.prefill, *made.snapshot.decode)]
    peers = {name: ADDRESSES[name.split("-")[0]] % index for index, name in enumerate(names)}
    snapshot = replace(
        made.snapshot,
        peers=MappingProxyType(peers),
        room_tokens=dict.fromkeys(names, room_tokens),
        block_tokens=BLOCK,
    )
    return replace(made, snapshot=snapshot)


class Priced(NamedTuple):
    cost_s: float
    ttft_s: float
    split_tokens: int


def all_splits(made: Question, d: ReplicaView, p: ReplicaView) -> Iterator[Priced]:
    """Every block boundary of every far tier, by what DESIGN.md says a split is."""
    n, price, room = made.prompt_tokens, made.compute_price, made.snapshot.room_tokens[d.name]
    host = {view.tier: view for view in d.tiers}.get(Tier.HOST)
    has = max(d.hit_tokens, host.hit_tokens if host else 0)
    own_s = host.curve.seconds((has - d.hit_tokens) * TOKEN_BYTES) if has > d.hit_tokens else 0.0
    p_host = {view.tier: view for view in p.tiers}.get(Tier.HOST)
    p_has = max(p.hit_tokens, p_host.hit_tokens if p_host else 0)
    p_own_s = 0.0
    if p_host and p_has > p.hit_tokens:
        p_own_s = p_host.curve.seconds((p_has - p.hit_tokens) * TOKEN_BYTES)
    for tier in (view for view in d.tiers if view.tier is not Tier.HOST):
        reach = min(tier.hit_tokens, (n - 1) // BLOCK * BLOCK)
        if reach - has > room:
            continue
        for m in range(max(has, p_has) + BLOCK, reach - BLOCK + 1, BLOCK):
            compute_s = p.curve.seconds(m - p_has, p_has)
            head_s = p.queue_s + p_own_s + compute_s + PEER.seconds((m - has) * TOKEN_BYTES)
            tail_s = d.queue_s + tier.curve.seconds((reach - m) * TOKEN_BYTES)
            rest_s = own_s + d.curve.seconds(n - reach, reach)
            stalled_s = (price + max(d.running, made.assumed_streams)) * rest_s
            ttft_s = max(head_s, tail_s) + rest_s
            yield Priced(ttft_s + stalled_s + price * compute_s + d.crowding_s, ttft_s, m)


def best_of_all(made: Question) -> Priced | None:
    pairs = ((d, p) for d in made.snapshot.decode for p in made.snapshot.prefill)
    return min((each for pair in pairs for each in all_splits(made, *pair)), default=None)


def unsplit(made: Question) -> Plan:
    return choose(replace(made, snapshot=replace(made.snapshot, block_tokens=0)))


# As fast to fetch as to compute, more or less, and most of it to be fetched, or nothing would be
# split: three plans of a hundred are.
LITTLE = st.sampled_from([0, 0, 0, 1, 2, 9]).map(lambda blocks: blocks * BLOCK)
MUCH = st.sampled_from([0, 2, 17, 20, 23, 24]).map(lambda blocks: blocks * BLOCK)
LINKS = st.builds(LinkCurve, st.floats(0.0, 0.1), st.floats(1e-8, 4e-8))
CURVES = st.builds(PrefillCurve, st.floats(0.0, 0.1), st.floats(0.001, 0.004), st.floats(0.0, 1e-6))
PROMPTS = st.integers(1, 24 * BLOCK) | st.integers(20 * BLOCK, 24 * BLOCK)


@st.composite
def replicas(draw: st.DrawFn) -> dict[str, object]:
    held = [
        TierView(Tier.HOST, draw(LINKS), draw(LITTLE)),
        TierView(Tier.DISK, draw(LINKS), draw(LITTLE)),
        TierView(Tier.VAULT, draw(LINKS), draw(MUCH)),
    ]
    return {
        "curve": draw(CURVES),
        "hit_tokens": draw(LITTLE),
        "queued_tokens": draw(st.sampled_from([0, 0, 100, 500])),
        "waiting": draw(st.integers(0, 1)),
        "running": draw(st.integers(0, 2)),
        "tiers": tuple(view for view in held if view.hit_tokens),
    }


POOLS = st.lists(replicas(), min_size=1, max_size=2)
SOME_POOLS = st.lists(replicas(), max_size=2)


@given(PROMPTS, SOME_POOLS, POOLS, st.sampled_from([0, 300, 10_000, 10_000]), st.floats(0.0, 0.5))
def test_the_plan_is_the_best_of_all_splits_and_the_others(
    n: int, prefill: Any, decode: Any, room: int, price: float
) -> None:
    """Against each block boundary of each tier of each pair: no split costs less than the one that
    is found. What is split costs least of all, by more than its curves' noise; what is not would
    not have."""
    made = asked(n, prefill, decode, room, compute_price=price)
    plan, other, best = choose(made), unsplit(made), best_of_all(made)
    columns = Columns.of(made.snapshot.decode, made.snapshot.prefill, made.snapshot.links)
    found = split.better(made, columns, ANYTHING_S)
    assert (found is None) is (best is None)
    if found is not None and best is not None:
        assert found.cost_s == pytest.approx(best.cost_s)
    enough_s = other.cost_s * (1.0 - split.LEAST_GAIN)
    if plan.shape is not Shape.SPLIT:
        assert plan == other
        if best is not None and other.cost_s > split.LEAST_COST_S:
            assert best.cost_s >= enough_s * (1.0 - 1e-9)
        return
    assert best is not None
    assert plan.cost_s == pytest.approx(best.cost_s)
    assert plan.cost_s <= enough_s
    assert plan.predicted_ttft_s >= 0.0


@given(PROMPTS, POOLS, POOLS)
def test_a_split_says_what_it_does(n: int, prefill: Any, decode: Any) -> None:
    """Its spans tile the prompt: on P up to the split, a fetch by D, and D's own compute. The hints
    bound both sides, the head's before all."""
    plan = choose(asked(n, prefill, decode))
    if plan.shape is not Shape.SPLIT:
        return
    assert plan.prefill is not None
    sources = [(span.source, span.replica) for span in plan.spans]
    if plan.spans[0].source is Source.HIT:
        assert sources.pop(0) == (Source.HIT, plan.prefill)
    wanted = [(Source.COMPUTE, plan.prefill), (Source.FETCH, plan.decode)]
    assert sources == [*wanted, (Source.COMPUTE, plan.decode)]
    tail, rest = plan.spans[-2:]
    assert (plan.hints.head_tokens, plan.hints.reach_tokens) == (tail.start_token, tail.end_token)
    assert plan.hints.tiers == (tail.tier,)
    assert rest.end_token == n
    assert plan.hints.deadline_s is not None
    assert 0.0 < plan.hints.head_deadline_s < plan.hints.deadline_s


def test_a_link_as_fast_as_computing_is_split_in_halves() -> None:
    """In half the time of either, and the header says so."""
    plan = choose(asked(2049, [{}], [vault(2048)]))
    assert (plan.shape, plan.reason) == (Shape.SPLIT, Reason.OVERLAP)
    head, tail, rest = plan.spans
    assert head == Span(Source.COMPUTE, 0, tail.start_token, "prefill-0")
    assert tail == Span(Source.FETCH, tail.start_token, 2048, "decode-0", Tier.VAULT)
    assert rest == Span(Source.COMPUTE, 2048, 2049, "decode-0")
    assert 800 <= tail.start_token <= 1024
    alone = unsplit(asked(2049, [{}], [vault(2048)]))
    assert plan.predicted_ttft_s <= 0.6 * alone.predicted_ttft_s
    assert plan.rivals[0].cost_s == alone.cost_s
    words = f"split; hit=0 fetch={2048 - tail.start_token}@decode-0/vault "
    assert plan.header().startswith(words + f"compute={tail.start_token}@prefill-0 compute=1@")
    assert plan.header().endswith("; reason=overlap")


@pytest.mark.parametrize("curve", [LinkCurve(0.02, 1e-10), LinkCurve(0.02, 2e-7)])
def test_a_link_that_is_much_faster_or_slower_is_not_split(curve: LinkCurve) -> None:
    """One side would wait for the other, or all but do it alone."""
    made = asked(2049, [{}], [vault(2048, curve)])
    assert choose(made) == unsplit(made)
    assert choose(made).shape in (Shape.FETCH, Shape.LOCAL, Shape.REMOTE)


def test_both_replicas_need_the_tier_and_the_decode_replica_room() -> None:
    """Whoever has no peer tier, or a host tier that cannot take the prompt in, is in no split."""
    made = asked(2049, [{}], [vault(2048)])
    for name in ("prefill-0", "decode-0"):
        peers = {at: peer for at, peer in made.snapshot.peers.items() if at != name}
        without = replace(made, snapshot=replace(made.snapshot, peers=peers))
        assert choose(without).shape is not Shape.SPLIT
    assert choose(asked(2049, [{}], [vault(2048)], room_tokens=2047)).shape is not Shape.SPLIT
    assert choose(asked(2049, [{}], [vault(2048)], room_tokens=2048)).shape is Shape.SPLIT


@pytest.mark.parametrize("why", ["local_only", "blind"])
def test_what_must_be_computed_is_not_split(why: str) -> None:
    """Where every position is computed, or nobody knows what is cached."""
    assert choose(asked(2049, [{}], [vault(2048)], **{why: True})).shape is not Shape.SPLIT


def test_what_may_take_nobody_s_place_is_not_split() -> None:
    """The host tier that would lend its head might not take it in."""
    made = asked(2049, [{}], [vault(2048)])
    assert choose(made).shape is Shape.SPLIT
    whole = choose(replace(made, may_split=False))
    assert (whole.shape, whole.cost_s) == (unsplit(made).shape, unsplit(made).cost_s)


def test_a_session_is_split_on_its_own_replica() -> None:
    """Or not at all."""
    made = asked(2049, [{}], [vault(2048), vault(2048)])
    for session in (b"a", b"b", b"c", b"d"):
        own = replace(made, affinity=session)
        assert choose(own).shape is Shape.SPLIT
        assert choose(own).decode == unsplit(own).decode


def test_parts_of_a_split_overlap() -> None:
    """P's begin with the plan and end when the head is at D; D's fetch ends when both sides are in,
    and what it computes behind them ends with the first token."""
    busy = {"queued_prefills": 1, "queued_tokens": 100}
    plan = choose(asked(2080, [busy], [vault(2048)]))
    assert plan.shape is Shape.SPLIT
    prefill = [part for part in plan.parts if part.replica == plan.prefill]
    decode = [part for part in plan.parts if part.replica == plan.decode]
    assert [part.action for part in prefill] == [Action.QUEUE, Action.COMPUTE]
    assert [part.action for part in decode] == [Action.FETCH, Action.COMPUTE]
    assert prefill[0].start_s == decode[0].start_s == 0.0
    assert prefill[-1].end_s <= decode[0].end_s * (1 + 1e-9)
    assert decode[-1].end_s == pytest.approx(plan.predicted_ttft_s)
