"""Hysteresis: which of several plans that cost about the same is taken."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.plan import Plan, Reason
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import ReplicaView, Snapshot
from tests.unit.router.test_router_pair import CURVE, LINK, TOKEN_BYTES, priced, snapshots, views

MARGINS = st.sampled_from([0.0, 0.01, 0.05, 0.3, 2.0])


def plan_of(snapshot: Snapshot, n: int, margin: float, affinity: bytes | None = None) -> Plan:
    return choose(Question(n, snapshot, 0.5, hysteresis=margin, affinity=affinity))


def lost_tokens(n: int, pool: tuple[ReplicaView, ...], name: str) -> int:
    """What another of its pool has of the prompt and it has not."""
    has = {view.name: min(view.hit_tokens, n - 1) for view in pool}
    return max(has.values()) - has[name]


def copied_tokens(n: int, snapshot: Snapshot, decode: str, prefill: str) -> int:
    """What a plan copies."""
    ps, ds = tuple(snapshot.prefill), tuple(snapshot.decode)
    return lost_tokens(n, ds, decode) + (lost_tokens(n, ps, prefill) if prefill else 0)


@given(st.integers(1, 2000), snapshots(), MARGINS)
def test_the_plan_is_the_cheapest_of_those_near_that_copy_the_least(
    n: int, snapshot: Snapshot, margin: float
) -> None:
    """Against every plan one by one: it costs no more than the margin allows; none as near copies
    less by more than noise; none that copies about as little costs less."""
    plan = plan_of(snapshot, n, margin)
    found = (str(plan.shape), plan.decode, plan.prefill or "")
    plans = {key: cost_s for key, (cost_s, _) in priced(n, snapshot).items()}
    copied = {(s, d, p): copied_tokens(n, snapshot, d, p) for s, d, p in plans}
    most_s, noise = min(plans.values()) * (1.0 + margin), margin * n + 1e-6
    assert plans[found] <= most_s * (1.0 + 1e-9)
    # Those that are just within the margin may be on either side of it.
    near = {key for key, cost_s in plans.items() if cost_s <= most_s * (1.0 - 1e-9)} | {found}
    if margin:
        assert copied[found] <= min(copied[key] for key in near) + noise
        near = {key for key in near if copied[key] <= copied[found]}
    assert plan.cost_s <= min(plans[key] for key in near) * (1.0 + 1e-9)


@given(st.integers(1, 2000), snapshots(), MARGINS)
def test_nothing_is_kept_where_nobody_holds_anything(
    n: int, snapshot: Snapshot, margin: float
) -> None:
    """A prompt that no replica knows follows cost alone, whatever the margin."""
    cold = replace(
        snapshot,
        prefill=tuple(replace(view, hit_tokens=0) for view in snapshot.prefill),
        decode=tuple(replace(view, hit_tokens=0) for view in snapshot.decode),
    )
    assert plan_of(cold, n, margin) == plan_of(cold, n, 0.0)


def balanced(difference: float) -> Snapshot:
    """Two decode replicas, of which the first has half of a prompt of 2,000 tokens, and so much to
    do before that it costs more than the other by this ratio."""
    n, weight = 2000, 1.6  # a stream is taken to wait, and compute has its price
    other_s = weight * CURVE.seconds(n, 0)
    queue_s = other_s * (1.0 + difference) - weight * CURVE.seconds(n // 2, n // 2)
    holder, other = views("decode", [{"hit_tokens": n // 2}, {}])
    return Snapshot((), (replace(holder, waiting=1, step_s=queue_s), other), {}, TOKEN_BYTES)


@pytest.mark.parametrize(
    ("difference", "margin", "decode", "reason"),
    [
        (-0.01, 0.05, "decode-0", Reason.NO_PREFILL_REPLICA),
        (0.01, 0.05, "decode-0", Reason.KEPT),
        (0.049, 0.05, "decode-0", Reason.KEPT),
        (0.051, 0.05, "decode-1", Reason.NO_PREFILL_REPLICA),
        (0.01, 0.0, "decode-1", Reason.NO_PREFILL_REPLICA),
    ],
)
def test_a_prefix_stays_until_another_replica_is_clearly_cheaper(
    difference: float, margin: float, decode: str, reason: Reason
) -> None:
    """Within the margin it stays, beyond it moves; the reason says which of both it was."""
    plan = plan_of(balanced(difference), 2000, margin)
    assert (plan.decode, plan.reason) == (decode, reason)
    if reason is Reason.KEPT:
        assert plan.rivals[0].cost_s < plan.cost_s


def test_noise_spreads_a_prefix_over_the_pool_only_without_hysteresis() -> None:
    """Forty like requests, whose replicas' costs differ by 2 % one way or the other: where each
    leaves a copy, noise makes two holders of one; the margin keeps it at one."""
    for margin, holders in ((0.0, 2), (0.05, 1)):
        holds = {"decode-0"}
        for number in range(40):
            snapshot = balanced(0.02 if number % 2 else -0.02)
            first, other = snapshot.decode
            if "decode-1" in holds:
                other = replace(other, hit_tokens=1000, waiting=1, step_s=first.step_s)
            holds.add(plan_of(replace(snapshot, decode=(first, other)), 2000, margin).decode)
        assert len(holds) == holders


def test_a_trifle_is_not_kept_together() -> None:
    """Everybody's first block on one replica draws nobody there for what is less than noise."""
    n = 4000
    first, second = views("decode", [{"hit_tokens": 32}, {}])
    busier = replace(first, waiting=1, step_s=0.2)
    snapshot = Snapshot((), (busier, second), {}, TOKEN_BYTES)
    assert plan_of(snapshot, n, 0.1).decode == "decode-1"


def test_a_session_goes_by_its_own_slack() -> None:
    """A session has its replica already: hysteresis adds nothing to it."""
    key = b"\x00" * 16
    snapshot = balanced(0.01)
    plan = choose(Question(2000, snapshot, 0.5, affinity=key, session_slack=0.0, hysteresis=0.05))
    assert plan.decode == "decode-1"
    assert plan.reason is not Reason.KEPT


def test_what_p_computes_stays_on_its_p() -> None:
    """A prefill replica that has the prefix is kept to as well, and by the same margin."""
    ps = views("prefill", [{"hit_tokens": 1000}, {}])
    ds = views("decode", [{"running": 31}])
    links = {(p.name, ds[0].name): LINK for p in ps}
    idle = Snapshot(ps, ds, links, TOKEN_BYTES)
    costs = {(s, p): cost_s for (s, _, p), (cost_s, _) in priced(2000, idle).items()}
    gap_s = costs["remote", "prefill-1"] - costs["remote", "prefill-0"]
    wait_s = gap_s + 0.01 * costs["remote", "prefill-1"]
    busy = replace(idle, prefill=(replace(ps[0], waiting=1, step_s=wait_s), ps[1]))
    assert plan_of(busy, 2000, 0.0).prefill == "prefill-1"
    assert (plan := plan_of(busy, 2000, 0.05)).prefill == "prefill-0"
    assert plan.reason is Reason.KEPT
