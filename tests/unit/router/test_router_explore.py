"""Exploration: which plans are tried that are not the cheapest, and how often."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import FetchCost
from kv.plan import Plan, Reason, Shape
from router.explorer import STALE_S, Explorer
from router.policy.explore import MOST_COST, Curve, Exploration, curves
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import Snapshot, TierView
from tests.unit.router.test_router_pair import priced, snapshots
from tests.unit.router.test_router_split import POOLS, PROMPTS, SOME_POOLS, asked
from tests.unit.router.test_router_tiers import CURVE, TOKEN_BYTES, question

DRAWS = st.floats(0.0, 1.0, exclude_max=True)


def tried(question: Question, draw: float, fresh: frozenset[Curve] = frozenset()) -> Plan:
    return choose(replace(question, exploration=Exploration(draw, fresh)))


def some_of(plan: Plan, data: st.DataObject) -> frozenset[Curve]:
    """Some of the curves that a plan stands on."""
    return frozenset(data.draw(st.sets(st.sampled_from(sorted(set(curves(plan)))))))


@given(st.integers(1, 2000), snapshots(), st.data())
def test_all_that_would_tell_something_is_tried_and_nothing_else(
    n: int, snapshot: Snapshot, data: st.DataObject
) -> None:
    """Against every plan one by one, over all draws: those within the bound that stand on a curve
    which is neither fresh nor the cheapest's."""
    asked_for = Question(n, snapshot, 0.5)
    cheapest = choose(asked_for)
    fresh = some_of(tried(asked_for, data.draw(DRAWS)), data) | some_of(cheapest, data)
    known = fresh.union(curves(cheapest))
    least_s = cheapest.cost_s * MOST_COST
    within, at_most = set(), set()
    for (shape, d, p), (cost_s, _) in priced(n, snapshot).items():
        needs = {("prefill", p or d)} | ({("link", p, d)} if p else set())
        if not needs <= known:
            within |= {(shape, p or None, d)} if cost_s < least_s * (1.0 - 1e-9) else set()
            at_most |= {(shape, p or None, d)} if cost_s <= least_s * (1.0 + 1e-9) else set()
    plans = [tried(asked_for, (draw + 0.5) / 50, fresh) for draw in range(50)]
    explored = [plan for plan in plans if plan.reason is Reason.EXPLORED]
    assert {(str(plan.shape), plan.prefill, plan.decode) for plan in explored} <= at_most
    assert all(plan == cheapest for plan in plans if plan.reason is not Reason.EXPLORED)
    # There are at most 30 plans, so that 50 even draws meet each.
    assert within <= {(str(plan.shape), plan.prefill, plan.decode) for plan in explored}
    for plan in explored:
        costs = priced(n, snapshot)[str(plan.shape), plan.decode, plan.prefill or ""]
        assert (plan.cost_s, plan.predicted_ttft_s) == pytest.approx(costs, rel=1e-9)
        assert plan.rivals[0].cost_s == cheapest.cost_s


@given(PROMPTS, SOME_POOLS, POOLS, DRAWS, st.data())
def test_a_trial_costs_a_bounded_ratio_and_tells_something(
    n: int, prefill: object, decode: object, draw: float, data: st.DataObject
) -> None:
    """With tiers and splits too: within the bound of the cheapest, with that as its first rival,
    and on a curve that nobody has used; where all are fresh the plan is the cheapest."""
    made = asked(n, prefill, decode)  # type: ignore[arg-type]
    cheapest, plan = choose(made), tried(made, draw)
    fresh = frozenset(curves(plan))
    assert tried(made, draw, fresh) == cheapest
    if plan.reason is not Reason.EXPLORED:
        assert plan == cheapest
        return
    assert cheapest.cost_s * (1.0 - 1e-9) <= plan.cost_s <= cheapest.cost_s * MOST_COST
    assert plan.rivals[0].cost_s == cheapest.cost_s
    assert not fresh <= set(curves(cheapest))
    assert plan.spans[-1].end_token == n


def by_vault(curve: LinkCurve, held: int = 992, n: int = 1000) -> Question:
    """One decode replica, whose vault holds a prompt."""
    return question(n, [], [{"tiers": (TierView(Tier.VAULT, curve, held),)}])


@pytest.mark.parametrize(
    ("per_byte_s", "shape"), [(5e-9, Shape.FETCH), (1e-8, Shape.FETCH), (1.4e-8, Shape.LOCAL)]
)
def test_a_fetch_that_is_told_to_cost_more_than_computing_is_tried(
    per_byte_s: float, shape: Shape
) -> None:
    """Computing takes 0.85 s with what it stalls; up to half as much again is spent on a tier that
    nobody has used, and the prediction is the tier's own."""
    curve = LinkCurve(0.02, per_byte_s)
    plan = tried(by_vault(curve), 0.0)
    assert plan.shape is shape
    if shape is Shape.FETCH:
        fetched_s = curve.seconds(992 * TOKEN_BYTES)
        assert plan.predicted_ttft_s == pytest.approx(fetched_s + CURVE.seconds(8, 992))
    fresh = frozenset({("fetch", "decode-0", "vault")})
    assert tried(by_vault(curve), 0.0, fresh) == choose(by_vault(curve))


@pytest.mark.parametrize("change", [{"local_only": True}, {"affinity": b"\0" * 16}])
def test_what_has_to_stay_where_it_is_does(change: dict[str, object]) -> None:
    """A session is not moved to another replica, and prompt logprobs are not experimented with."""
    made = replace(question(1000, [{}], [{}, {}, {}]), **change)  # type: ignore[arg-type]
    home = choose(made)
    plans = [tried(made, draw / 50) for draw in range(50)]
    assert {plan.decode for plan in plans} == {home.decode}
    explored = any(plan.reason is Reason.EXPLORED for plan in plans)
    assert explored is not made.local_only


def test_without_a_catalogue_nothing_is_tried() -> None:
    """What is unknown already is not made worse."""
    made = question(1000, [{}], [{}, {}], blind=True)
    assert {tried(made, draw / 20).reason for draw in range(20)} == {Reason.NO_CATALOGUE}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_the_budget_is_a_share_of_requests() -> None:
    """One in a hundred may explore, none where that is off."""
    explorer = Explorer(0.01, Clock(), random.Random(3))
    chances = sum(explorer.exploration() is not None for _ in range(20_000))
    assert chances == pytest.approx(200, rel=0.3)
    off = Explorer(0.0, Clock(), random.Random(3))
    assert all(off.exploration() is None for _ in range(1000))


def test_a_curve_is_stale_once_it_was_not_used_for_long() -> None:
    """What was used of late is fresh, and is forgotten when it no longer is."""
    clock = Clock()
    explorer = Explorer(1.0, clock, random.Random(3))
    plan = choose(by_vault(LinkCurve(0.02, 1e-10)))
    used = frozenset({("prefill", "decode-0"), ("fetch", "decode-0", "vault")})

    def fresh() -> frozenset[Curve]:
        exploration = explorer.exploration()
        assert exploration is not None
        return exploration.fresh

    assert fresh() == frozenset()
    explorer.uses(plan)
    assert fresh() == used
    clock.now_s += STALE_S - 1.0
    assert fresh() == used
    clock.now_s += 1.0
    assert fresh() == frozenset()


def test_what_moves_no_curve_leaves_all_as_stale_as_they_were() -> None:
    """A request that gives way tells nothing of what it uses."""
    explorer = Explorer(1.0, Clock(), random.Random(3))
    plan = choose(by_vault(LinkCurve(0.02, 1e-10)))
    explorer.uses(plan, yields=True)
    exploration = explorer.exploration()
    assert exploration is not None
    assert exploration.fresh == frozenset()


def test_what_two_tiers_bring_tells_of_neither() -> None:
    """An engine sees how long a request waited for both."""
    held = (
        TierView(Tier.HOST, LinkCurve(0.005, 1e-10), 500),
        TierView(Tier.VAULT, LinkCurve(0.02, 1e-10), 992),
    )
    plan = choose(question(1000, [], [{"tiers": held}]))
    assert [span.tier for span in plan.spans if span.tier] == [Tier.HOST, Tier.VAULT]
    assert set(curves(plan)) == {("prefill", "decode-0")}


def test_a_prefix_that_a_peer_may_add_to_tells_of_no_tier() -> None:
    """Nor does what is borrowed make a plan worth trying: it was not priced by it."""
    plan = choose(by_vault(LinkCurve(0.02, 1e-10)))
    lent = replace(plan, hints=replace(plan.hints, peer="tcp://10.0.0.1:5"))
    assert set(curves(plan)) - set(curves(lent)) == {("fetch", "decode-0", "vault")}


def test_a_split_tells_of_its_head() -> None:
    """Of P's computing and of the way to D; D waits for both sides, so nothing tells them apart."""
    tail = (TierView(Tier.VAULT, LinkCurve(0.02, 5e-9), 1952),)
    plan = choose(asked(2000, [{}], [{"tiers": tail}]))
    assert plan.shape is Shape.SPLIT
    assert set(curves(plan)) == {("prefill", "prefill-0"), ("fetch", "decode-0", "peer")}


def found_out(share: float) -> tuple[int, int]:
    """How many of 2,000 requests tried a vault that is ten times as fast as was guessed, which is a
    little slower than computing; and how many of the last 100 fetched."""
    clock = Clock()
    explorer = Explorer(share, clock, random.Random(3))
    cost, real = FetchCost(LinkCurve(0.02, 9e-9)), LinkCurve(0.02, 9e-10)
    shapes, explored = [], 0
    for _ in range(2000):
        clock.now_s += 1.0
        made = replace(by_vault(cost.curve(clock.now_s)), exploration=explorer.exploration())
        plan = choose(made)
        explorer.uses(plan)
        shapes.append(plan.shape)
        explored += plan.reason is Reason.EXPLORED
        if plan.shape is Shape.FETCH:
            n_bytes = 992 * TOKEN_BYTES
            cost.saw(n_bytes, real.seconds(n_bytes), clock.now_s)
    return explored, shapes[-100:].count(Shape.FETCH)


def test_a_guess_that_was_too_dear_is_found_out() -> None:
    """Without exploration nobody ever fetches; with it, all do after a trial or a few."""
    assert found_out(0.0) == (0, 0)
    explored, fetches = found_out(0.01)
    assert 1 <= explored <= 10
    assert fetches == 100


def test_a_curve_that_is_right_is_left_alone_for_long() -> None:
    """Of requests by the thousand, each of which may explore, one in five minutes tries a dear
    tier."""
    clock = Clock()
    explorer = Explorer(1.0, clock, random.Random(3))
    explored = 0
    for _ in range(7000):
        clock.now_s += 0.1
        made = replace(by_vault(LinkCurve(0.02, 9e-9)), exploration=explorer.exploration())
        plan = choose(made)
        explorer.uses(plan)
        explored += plan.reason is Reason.EXPLORED
    assert explored == 3
