"""The policies that compare no costs: the kill switch and the baselines."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.curve import LinkCurve, PrefillCurve
from kv.plan import Plan, Reason, Shape, Source, Span
from router.errors import NoReplicaError
from router.policy import Policy, least_loaded, prefix_affinity, round_robin
from router.policy.question import Question
from router.policy.registry import CHOOSE
from router.snapshot import ReplicaView, Snapshot

CURVE = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.05, 1e-9)
TOKEN_BYTES = 100_000
IDLE = ReplicaView("", CURVE, 0.02, 0, 0, 0, 0, 32, 0)
UNCOSTED = [least_loaded.choose, prefix_affinity.choose, round_robin.choose]


def views(role: str, changes: list[dict[str, object]]) -> tuple[ReplicaView, ...]:
    return tuple(
        replace(IDLE, name=f"{role}-{index}", **change) for index, change in enumerate(changes)
    )


def question(
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    prompt_tokens: int = 1000,
    ticket: int = 0,
    local_only: bool = False,
    cold: frozenset[tuple[str, str]] = frozenset(),
) -> Question:
    """Each dict is what differs from an idle replica; every pair but `cold` is warm."""
    ps, ds = views("prefill", prefill), views("decode", decode)
    links = {(p.name, d.name): LINK for p in ps for d in ds if (p.name, d.name) not in cold}
    snapshot = Snapshot(ps, ds, links, TOKEN_BYTES)
    return Question(prompt_tokens, snapshot, 0.5, local_only, ticket=ticket)


def chosen(plan: Plan) -> tuple[str | None, str]:
    return plan.prefill, plan.decode


def test_every_policy_has_its_function() -> None:
    """The closed list and the mapping are of the same length, and no function stands twice."""
    assert set(CHOOSE) == set(Policy)
    assert len(set(CHOOSE.values())) == len(Policy)


@pytest.mark.parametrize(
    ("case", "prefill", "decode", "expected"),
    [
        ("the fewest requests", [], [{"running": 2}, {"running": 1}], (None, "decode-1")),
        ("waiting counts too", [], [{"waiting": 2}, {"running": 1}], (None, "decode-1")),
        ("ties by queued tokens", [], [{"queued_tokens": 5}, {}], (None, "decode-1")),
        ("then by name", [], [{}, {}], (None, "decode-0")),
        ("a hit counts nothing", [], [{}, {"hit_tokens": 960}], (None, "decode-0")),
        ("the shorter queue of P", [{"queued_tokens": 9}, {}], [{}], ("prefill-1", "decode-0")),
        ("P even where D has all", [{}], [{"hit_tokens": 992}], ("prefill-0", "decode-0")),
    ],
)
def test_the_least_loaded_is_chosen(
    case: str,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    expected: tuple[str | None, str],
) -> None:
    """The table says who serves, and the reason is the kill switch's."""
    plan = least_loaded.choose(question(prefill, decode))
    assert chosen(plan) == expected, case
    assert plan.reason is Reason.LEAST_LOADED


def test_the_longest_prefix_wins_whatever_the_load() -> None:
    """In both pools, by prefix alone."""
    prefill = [{"hit_tokens": 320, "queued_tokens": 90_000}, {"hit_tokens": 304}]
    decode = [{}, {"hit_tokens": 16, "running": 40, "waiting": 9}]
    for ticket in range(4):
        plan = prefix_affinity.choose(question(prefill, decode, ticket=ticket))
        assert chosen(plan) == ("prefill-0", "decode-1")
        assert plan.reason is Reason.PREFIX_AFFINITY
    assert plan.spans == (
        Span(Source.HIT, 0, 320, "prefill-0"),
        Span(Source.COMPUTE, 320, 1000, "prefill-0"),
    )


def test_holders_of_the_same_prefix_take_turns() -> None:
    """Those that tie serve alike often, and nobody else serves."""
    decode = [{"hit_tokens": 32}, {}, {"hit_tokens": 32}]
    plans = [prefix_affinity.choose(question([], decode, ticket=n)) for n in range(6)]
    assert Counter(map(chosen, plans)) == {(None, "decode-0"): 3, (None, "decode-2"): 3}


def test_replicas_take_turns_by_name() -> None:
    """Each pool turns by itself, evenly."""
    loaded = [{"running": 30, "hit_tokens": 960}, {}, {}]
    plans = [round_robin.choose(question([{}, {}], loaded, ticket=n)) for n in range(6)]
    assert [plan.decode[-1] for plan in plans] == list("012012")
    assert [str(plan.prefill)[-1] for plan in plans] == list("010101")
    assert {plan.reason for plan in plans} == {Reason.ROUND_ROBIN}


@pytest.mark.parametrize("choose", UNCOSTED)
def test_what_cannot_be_handed_over_is_computed_locally(choose: object) -> None:
    """Prompt logprobs, no prefill replica, and a D that no P is linked to."""
    cold = frozenset({("prefill-0", "decode-0")})
    for asked in (
        question([{}], [{}], local_only=True),
        question([], [{}]),
        question([{}], [{}], cold=cold),
    ):
        plan = choose(asked)  # type: ignore[operator]
        assert (plan.shape, plan.prefill) == (Shape.LOCAL, None)


@pytest.mark.parametrize("policy", Policy)
def test_without_a_decode_replica_no_policy_serves(policy: Policy) -> None:
    """The error counts who is up."""
    with pytest.raises(NoReplicaError, match="0 decode and 1 prefill"):
        CHOOSE[policy](question([{}], []))


def test_a_remote_prediction_is_queue_compute_and_link() -> None:
    """The audit compares the kill switch's predictions like all others."""
    prefill = [{"hit_tokens": 320, "queued_tokens": 100, "queued_prefills": 1, "waiting": 1}]
    plan = least_loaded.choose(question(prefill, [{"hit_tokens": 160}], prompt_tokens=2000))
    queue_s = CURVE.seconds(100, 0) + 0.02
    link_s = LINK.seconds((2000 - 160) * TOKEN_BYTES)
    assert plan.predicted_ttft_s == pytest.approx(queue_s + CURVE.seconds(1680, 320) + link_s)


class _Broken(PrefillCurve):
    """A curve that was fitted to nonsense."""

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        return [float("nan"), float("inf"), -1.0, 1 / (new_tokens - 1000)][cached_tokens // 16]


@pytest.mark.parametrize("hit_tokens", [0, 16, 32, 48])
@pytest.mark.parametrize("choose", UNCOSTED)
def test_a_curve_that_predicts_nothing_stops_nobody(choose: object, hit_tokens: int) -> None:
    """Not finite, below zero, or an error: the request is served, and the prediction is 0."""
    decode = [{"curve": _Broken(0.0, 0.0, 0.0), "hit_tokens": hit_tokens}]
    plan = choose(question([], decode, prompt_tokens=1000 + hit_tokens))  # type: ignore[operator]
    assert plan.predicted_ttft_s == 0.0


counts = st.integers(0, 3) | st.integers(0, 5000)
replicas = st.fixed_dictionaries(
    {
        "queued_tokens": counts,
        "queued_prefills": st.integers(0, 9),
        "waiting": st.integers(0, 5),
        "running": st.integers(0, 40),
        "hit_tokens": st.integers(0, 120).map(lambda blocks: 16 * blocks),
    }
)
pools = st.lists(replicas, max_size=4)


@given(
    st.integers(1, 4000),
    pools,
    pools.filter(bool),
    st.integers(0, 99),
    st.sampled_from(Policy),
    st.data(),
    st.randoms(use_true_random=False),
)
def test_a_plan_does_not_depend_on_the_order_of_replicas(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    ticket: int,
    policy: Policy,
    data: st.DataObject,
    rng: random.Random,
) -> None:
    """Equal questions get equal plans, however replicas are listed; the plan tiles the prompt,
    and its pair is warm."""
    pairs = [(f"prefill-{p}", f"decode-{d}") for p in range(len(prefill)) for d in range(4)]
    cold = frozenset(data.draw(st.sets(st.sampled_from(pairs))) if pairs else ())
    asked = question(prefill, decode, prompt_tokens, ticket, cold=cold)
    snapshot = asked.snapshot
    shuffled = replace(
        snapshot,
        prefill=tuple(rng.sample(list(snapshot.prefill), len(prefill))),
        decode=tuple(rng.sample(list(snapshot.decode), len(decode))),
    )
    plan = CHOOSE[policy](asked)
    assert CHOOSE[policy](replace(asked, snapshot=shuffled)) == plan
    assert plan.spans[-1].end_token == prompt_tokens
    assert plan.prefill is None or (plan.prefill, plan.decode) in snapshot.links


@given(pools, pools.filter(bool))
def test_nobody_is_less_loaded_than_the_least_loaded(
    prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> None:
    """No decode replica has fewer requests than the chosen one, no prefill replica a shorter
    queue; and whatever is cached, the choice is the same."""
    asked = question(prefill, decode)
    plan = least_loaded.choose(asked)
    load = {view.name: view.running + view.waiting for view in asked.snapshot.decode}
    queue = {view.name: view.queued_tokens for view in asked.snapshot.prefill}
    assert load[plan.decode] == min(load.values())
    assert (plan.prefill is None) == (not queue)
    assert plan.prefill is None or queue[plan.prefill] == min(queue.values())
    bare = [[{**each, "hit_tokens": 0} for each in pool] for pool in (prefill, decode)]
    assert chosen(least_loaded.choose(question(*bare))) == chosen(plan)
