"""Which replica a plan's hints name as one that may lend the prefix."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.fetch import GUESSES
from kv.plan import Plan, Shape
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import TierView
from tests.unit.router.test_router_split import asked as split_question
from tests.unit.router.test_router_tiers import question, tiers

TOKEN_BYTES = 100_000
# Too much to wait for, so that the plan computes on the other one.
BUSY: dict[str, object] = {"queued_prefills": 10, "queued_tokens": 20_000, "waiting": 10}
A, B = "tcp://10.0.0.1:5", "tcp://10.0.0.2:5"
BOTH = {"decode-0": A, "decode-1": B}


def asked(decode: list[dict[str, object]], peers: dict[str, str], **more: Any) -> Question:
    made = question(2000, [], decode, **more)
    return replace(made, snapshot=replace(made.snapshot, peers=MappingProxyType(peers)))


def plan(decode: list[dict[str, object]], peers: dict[str, str] = BOTH, **more: Any) -> Plan:
    return choose(asked(decode, peers, **more))


@pytest.mark.parametrize("held", [{"hit_tokens": 1600}, {"tiers": tiers(host=1600)}])
def test_a_busy_replica_lends_what_an_idle_one_computes(held: dict[str, object]) -> None:
    """From its host tier, which has a copy of what its paged KV has; waited for as long as
    computing those tokens would take."""
    made = plan([{**BUSY, **held}, {}])
    assert made.spans[-1].replica == "decode-1"
    assert (made.hints.peer, made.hints.reach_tokens) == (A, 1600)
    assert Tier.PEER in made.hints.tiers
    whole = PrefillCurve(0.02, 0.0005, 1e-8)
    saved_s = whole.seconds(2000, 0) - whole.seconds(400, 1600)
    assert made.hints.deadline_s == pytest.approx(saved_s)


@pytest.mark.parametrize("peers", [{}, {"decode-0": A}, {"decode-1": B}])
def test_nobody_is_named_where_not_both_lend(peers: dict[str, str]) -> None:
    """A replica without the tier has nothing to ask with, or nothing to give."""
    assert plan([{**BUSY, "hit_tokens": 1600}, {}], peers).hints.peer is None


def test_nobody_is_named_who_has_no_more() -> None:
    """What is there already is not asked for."""
    assert plan([{**BUSY, "hit_tokens": 640}, {"hit_tokens": 640}]).hints.peer is None


def test_what_takes_longer_than_computing_is_not_asked_for() -> None:
    """A short span behind what is there is computed sooner than a peer answers."""
    made = plan([{**BUSY, "hit_tokens": 672}, {"hit_tokens": 640}])
    curve = PrefillCurve(0.02, 0.0005, 1e-8)
    fetch_s = GUESSES[Tier.PEER].seconds(32 * TOKEN_BYTES)
    assert fetch_s > curve.seconds(32, 640) - curve.base_s
    assert made.hints.peer is None


@pytest.mark.parametrize(("per_byte_s", "asked_for"), [(1e-9, True), (4e-9, True), (6e-9, False)])
def test_a_link_that_is_known_to_be_slow_is_not_asked(per_byte_s: float, asked_for: bool) -> None:
    """By the borrower's own curve: 1,600 tokens take 0.8 s to compute. What the lender's costs is
    another's business."""
    slow = LinkCurve(0.02, 1e-6)
    borrower = {"peer": LinkCurve(0.02, per_byte_s)}
    made = plan([{**BUSY, "hit_tokens": 1600, "peer": slow}, borrower])
    assert (made.hints.peer == A) is asked_for


@pytest.mark.parametrize(
    ("peer", "splits"), [(GUESSES[Tier.PEER], True), (LinkCurve(0.02, 1e-7), False)]
)
def test_a_split_s_head_is_priced_by_the_link_of_whoever_takes_it(
    peer: LinkCurve, splits: bool
) -> None:
    """A link that turned out slow ends splits, and the price is the slower link's."""
    tail = (TierView(Tier.VAULT, LinkCurve(0.02, 5e-9), 1952),)
    made = split_question(2000, [{}], [{"tiers": tail, "peer": peer}])
    found = choose(made)
    assert (found.shape is Shape.SPLIT) is splits
    if splits:
        dearer = replace(peer, latency_s=peer.latency_s + 0.02)
        again = choose(split_question(2000, [{}], [{"tiers": tail, "peer": dearer}]))
        assert again.shape is Shape.SPLIT
        assert again.cost_s > found.cost_s


def test_prompt_logprobs_are_not_borrowed() -> None:
    """Every position is computed where the answer is made."""
    assert plan([{**BUSY, "hit_tokens": 1600}, {}], local_only=True).hints.peer is None


@given(st.integers(0, 2500), st.integers(0, 2500), st.integers(0, 2500))
def test_a_peer_changes_no_plan(first: int, second: int, host: int) -> None:
    """Only the hints: who computes, its spans and its price are those without peers, and the reach
    is never less."""
    decode: list[dict[str, object]] = [
        {**BUSY, "hit_tokens": first, "tiers": tiers(host=host)},
        {"hit_tokens": second, "tiers": tiers(host=0)},
    ]
    alone, beside = plan(decode, {}), plan(decode)
    assert replace(beside, hints=alone.hints) == alone
    assert (beside.hints.reach_tokens or 0) >= (alone.hints.reach_tokens or 0)
