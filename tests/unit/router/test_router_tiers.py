"""Plans that take a prefix from tiers: when they are made, and what they tell the engine."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.plan import UNHINTED, Hints, Plan, Reason, Shape, Source, Span
from router.policy import least_loaded
from router.policy.pair import LEAST_PATIENCE_S, Question, choose
from router.snapshot import ReplicaView, Snapshot, TierView, Unnamed

# 1,000 tokens take about 0.5 s to compute, 0.01 s to fetch from host memory, 0.1 s from disk.
CURVE = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.05, 1e-9)
TOKEN_BYTES = 100_000
HOST, DISK = LinkCurve(0.005, 5e-11), LinkCurve(0.015, 1e-9)
SLOW = LinkCurve(0.015, 1e-7)
IDLE = ReplicaView("", CURVE, 0.02, 0, 0, 0, 0, 32, 0)


def tiers(host: int = 0, disk: int = 0, disk_curve: LinkCurve = DISK) -> tuple[TierView, ...]:
    return TierView(Tier.HOST, HOST, host), TierView(Tier.DISK, disk_curve, disk)


def views(role: str, changes: list[dict[str, object]]) -> tuple[ReplicaView, ...]:
    return tuple(
        replace(IDLE, name=f"{role}-{index}", **change)  # type: ignore[arg-type]
        for index, change in enumerate(changes)
    )


def question(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    **asked: bool,
) -> Question:
    ps, ds = views("prefill", prefill), views("decode", decode)
    blind = asked.pop("blind", False)
    pairs = {(p.name, d.name): LINK for p in ps for d in ds}
    snapshot = Snapshot(ps, ds, pairs, TOKEN_BYTES, blind=blind)
    return Question(prompt_tokens, snapshot, 0.5, **asked)


def plan_of(
    prompt_tokens: int, prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> Plan:
    return choose(question(prompt_tokens, prefill, decode))


def test_what_left_the_device_is_fetched_behind_what_is_there() -> None:
    """Hit, then host memory, then disk, then compute; predicted as the sum of its parts, and the
    engine is told no more than that."""
    plan = plan_of(2000, [], [{"hit_tokens": 320, "tiers": tiers(host=960, disk=1600)}])
    assert plan.spans == (
        Span(Source.HIT, 0, 320, "decode-0"),
        Span(Source.FETCH, 320, 960, "decode-0", Tier.HOST),
        Span(Source.FETCH, 960, 1600, "decode-0", Tier.DISK),
        Span(Source.COMPUTE, 1600, 2000, "decode-0"),
    )
    fetch_s = HOST.seconds(640 * TOKEN_BYTES) + DISK.seconds(640 * TOKEN_BYTES)
    assert plan.predicted_ttft_s == pytest.approx(fetch_s + CURVE.seconds(400, 1600))
    assert (plan.shape, plan.reason) == (Shape.FETCH, Reason.CHEAPER_FETCH)
    assert (plan.hints.reach_tokens, plan.hints.tiers) == (1600, (Tier.HOST, Tier.DISK))
    assert "; hit=320@decode-0 fetch=640@decode-0/host fetch=640@decode-0/disk " in plan.header()


@pytest.mark.parametrize(
    ("predicted_s", "overrun", "deadline_s"),
    [(0.3, 2.0, 0.6), (0.3, 3.0, 0.9), (0.7, 2.0, 1.0), (0.01, 2.0, LEAST_PATIENCE_S)],
)
def test_a_fetch_is_late_by_its_prediction(
    predicted_s: float, overrun: float, deadline_s: float
) -> None:
    """By so many times, but no later than computing would be done: whoever computes after all has
    spent twice the time at most. And no sooner than an engine looks."""
    curve = LinkCurve(0.0, predicted_s / (1600 * TOKEN_BYTES))
    computing = PrefillCurve(0.0, 1.0 / 1600, 0.0)  # what the tier has takes 1 s
    held = {"curve": computing, "tiers": tiers(disk=1600, disk_curve=curve)}
    plan = choose(replace(question(2000, [], [held]), overrun=overrun))
    assert plan.predicted_ttft_s == pytest.approx(predicted_s + 0.25)
    assert plan.hints.deadline_s == pytest.approx(deadline_s)


def test_a_vault_is_waited_for_no_longer_for_what_others_may_have_there() -> None:
    """A fetch that is planned is late by its prediction, vault or not, and brings what is planned;
    only where a replica does not know its own blocks it is asked for what comes next."""
    disk = tiers(disk=1600, disk_curve=LinkCurve(0.0, 0.1 / (1600 * TOKEN_BYTES)))
    known, own = (
        plan_of(2000, [], [{"tiers": disk, "unnamed": each}]).hints
        for each in (Unnamed.VAULT, Unnamed.OWN)
    )
    assert (known.reach_tokens, known.tiers) == (1600, (Tier.DISK,))
    assert known.deadline_s == pytest.approx(0.2)
    assert (own.reach_tokens, own.tiers) == (UNHINTED.reach_tokens, UNHINTED.tiers)


def test_a_tier_that_is_slower_than_computing_is_not_used() -> None:
    """The part that host memory has is; and the engine may not load the rest."""
    slow = tiers(host=640, disk=1600, disk_curve=SLOW)
    plan = plan_of(2000, [], [{"tiers": slow}])
    assert [span.tier for span in plan.spans] == [Tier.HOST, None]
    assert (plan.hints.reach_tokens, plan.hints.tiers) == (640, (Tier.HOST,))
    plan = plan_of(2000, [], [{"tiers": tiers(disk=1600, disk_curve=SLOW)}])
    assert [span.source for span in plan.spans] == [Source.COMPUTE]
    assert plan.shape is Shape.LOCAL
    assert plan.hints == Hints() == Hints(0, (), None)


def test_a_few_tokens_are_not_worth_asking_a_tier() -> None:
    """Fetching has a constant part; computing 8 tokens more takes less."""
    plan = plan_of(2000, [], [{"hit_tokens": 1600, "tiers": tiers(host=1604)}])
    assert [span.source for span in plan.spans] == [Source.HIT, Source.COMPUTE]
    assert plan.hints == Hints(1600)


def test_a_slow_tier_before_a_fast_one_is_passed_with_it() -> None:
    """Tiers continue each other: what lies behind a slow part is reached if both are worth it."""
    slow_host = (TierView(Tier.HOST, LinkCurve(0.4, 0.0), 160), TierView(Tier.DISK, DISK, 1600))
    plan = plan_of(2000, [], [{"tiers": slow_host}])
    assert [span.tier for span in plan.spans] == [Tier.HOST, Tier.DISK, None]


def test_a_long_host_hit_beats_computing_elsewhere() -> None:
    """Also where the holder is the busier one; not where its queue is longer than the prefix."""
    held = {"tiers": tiers(host=1600), "running": 2}
    assert plan_of(2000, [], [held, {}]).decode == "decode-0"
    queued = {**held, "queued_tokens": 8000, "queued_prefills": 4}
    assert plan_of(2000, [], [queued, {}]).decode == "decode-1"


def test_a_prefill_replica_fetches_what_it_hands_off() -> None:
    """P's tiers count for what it computes; D's count for nothing behind a handoff, though its
    device hit does."""
    busy = {"running": 20, "hit_tokens": 160, "tiers": tiers(host=320)}
    plan = plan_of(2000, [{"tiers": tiers(host=1600)}], [busy])
    assert (plan.shape, plan.reason) == (Shape.FETCH_REMOTE, Reason.CHEAPER_FETCH)
    assert [(span.source, span.replica) for span in plan.spans] == [
        (Source.FETCH, "prefill-0"),
        (Source.COMPUTE, "prefill-0"),
    ]
    ttft_s = HOST.seconds(1600 * TOKEN_BYTES) + CURVE.seconds(400, 1600)
    ttft_s += LINK.seconds((2000 - 160) * TOKEN_BYTES)
    assert plan.predicted_ttft_s == pytest.approx(ttft_s)
    assert plan.hints.reach_tokens == 1600


def test_streams_do_not_stall_while_a_prefix_is_fetched() -> None:
    """A fetch costs its seconds once, however many streams run; computing costs each of them."""
    alone = plan_of(2000, [], [{"tiers": tiers(disk=1600)}])
    beside = plan_of(2000, [], [{"tiers": tiers(disk=1600), "running": 10}])
    compute_s, fetch_s = CURVE.seconds(400, 1600), DISK.seconds(1600 * TOKEN_BYTES)
    assert alone.cost_s == pytest.approx(1.6 * compute_s + fetch_s)
    assert beside.cost_s == pytest.approx(11.1 * compute_s + fetch_s + 10 * 0.02)


def test_prompt_logprobs_are_not_fetched() -> None:
    """The engine computes every position for them, whatever its tiers hold."""
    plan = choose(question(2000, [], [{"tiers": tiers(host=1600)}], local_only=True))
    assert [span.source for span in plan.spans] == [Source.COMPUTE]
    assert plan.hints == Hints()


@pytest.mark.parametrize(
    ("replica", "blind"),
    [({"unnamed": Unnamed.OWN}, False), ({"unnamed": Unnamed.VAULT}, False), ({}, True)],
    ids=["unnamed", "a vault", "blind"],
)
def test_where_nobody_can_say_what_tiers_hold_they_are_asked(
    replica: dict[str, object], blind: bool
) -> None:
    """For as long as computing would take: files of an earlier process, or no catalogue."""
    plan = choose(question(2000, [], [replica], blind=blind))
    assert plan.hints == replace(UNHINTED, deadline_s=pytest.approx(CURVE.seconds(2000, 0)))
    assert [span.source for span in plan.spans] == [Source.COMPUTE]


def test_what_is_known_and_too_slow_is_not_asked_for() -> None:
    """Though the replica has other blocks that nobody can name."""
    tiers_ = tiers(disk=1600, disk_curve=SLOW)
    plan = plan_of(2000, [], [{"tiers": tiers_, "unnamed": Unnamed.OWN}])
    assert plan.hints == Hints()


def test_policies_that_look_at_no_costs_leave_tiers_to_the_engine() -> None:
    """The kill switch and the baselines: as an engine alone would do."""
    plan = least_loaded.choose(question(2000, [], [{"tiers": tiers(host=1600)}]))
    assert plan.hints == UNHINTED


depths = st.integers(0, 130).map(lambda blocks: 16 * blocks)
costs = st.sampled_from([HOST, DISK, SLOW, LinkCurve(0.3, 0.0)])
replicas = st.fixed_dictionaries(
    {
        "hit_tokens": depths,
        "running": st.integers(0, 3),
        "queued_tokens": st.integers(0, 2000),
        "tiers": st.builds(
            lambda host, a, disk, b: (TierView(Tier.HOST, a, host), TierView(Tier.DISK, b, disk)),
            depths,
            costs,
            depths,
            costs,
        ),
    }
)


def ways(n: int, view: ReplicaView) -> list[tuple[float, int]]:
    """Fetching through none, one or both tiers: its seconds, and tokens not computed then."""
    reach, spent = min(view.hit_tokens, n - 1), 0.0
    found = [(spent, reach)]
    for tier in view.tiers:
        further = max(reach, min(tier.hit_tokens, n - 1))
        if further > reach:
            spent += tier.curve.seconds((further - reach) * TOKEN_BYTES)
        reach = further
        found.append((spent, reach))
    return found


def least(n: int, view: ReplicaView, weight: float) -> float:
    """The price of whoever computes, tiers and all, one replica at a time."""
    return min(
        spent + weight * view.curve.seconds(n - reach, reach) for spent, reach in ways(n, view)
    )


@given(
    st.integers(1, 3000), st.lists(replicas, max_size=3), st.lists(replicas, min_size=1, max_size=3)
)
def test_all_plans_at_once_cost_what_each_costs_alone(
    n: int, prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> None:
    """The cheapest of every replica's every way, reckoned one by one; and the spans tell the way
    whose price was paid."""
    ps, ds = views("prefill", prefill), views("decode", decode)
    prices = [least(n, d, 1.1 + max(d.running, 0.5)) + d.queue_s + d.crowding_s for d in ds]
    for d in ds:
        moved_s = LINK.seconds((n - min(d.hit_tokens, n - 1)) * TOKEN_BYTES)
        entry_s = d.waiting * d.step_s + d.crowding_s
        prices += [least(n, p, 1.1) + p.queue_s + moved_s + entry_s for p in ps]
    plan = plan_of(n, prefill, decode)
    assert plan.cost_s == pytest.approx(min(prices))
    fetches = [span for span in plan.spans if span.source is Source.FETCH]
    assert plan.spans[-1].end_token == n
    assert (plan.shape in (Shape.FETCH, Shape.FETCH_REMOTE)) is bool(fetches)
    assert plan.hints.reach_tokens == plan.spans[-1].start_token
    assert plan.hints.tiers == tuple(span.tier for span in fetches)
