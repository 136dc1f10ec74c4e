"""What a predicted time to first token is made of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.parts import Action, Part, in_turn
from kv.plan import Plan, Shape
from router.policy import least_loaded
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import ReplicaView, Snapshot, TierView

CURVE = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.05, 1e-9)
HOST = LinkCurve(0.005, 5e-11)
TOKEN_BYTES = 100_000
IDLE = ReplicaView("", CURVE, 0.02, 0, 0, 0, 0, 32, 0)


def question(prompt_tokens: int, prefill: ReplicaView | None, decode: ReplicaView) -> Question:
    ds = (replace(decode, name="decode-0"),)
    ps = () if prefill is None else (replace(prefill, name="prefill-0"),)
    links = {("prefill-0", "decode-0"): LINK} if ps else {}
    return Question(prompt_tokens, Snapshot(ps, ds, links, TOKEN_BYTES), 0.5)


def shown(plan: Plan) -> list[tuple[Action, str]]:
    return [(part.action, part.replica) for part in plan.parts]


def test_a_handoff_s_parts_are_p_s_then_d_s() -> None:
    """P's queue and compute, then what waits at D, then the move, which ends with the plan."""
    busy = replace(IDLE, queued_prefills=1, queued_tokens=400, waiting=1)
    plan = choose(question(2000, busy, replace(IDLE, running=9, waiting=2)))
    assert plan.shape is Shape.REMOTE
    assert shown(plan) == [
        (Action.QUEUE, "prefill-0"),
        (Action.COMPUTE, "prefill-0"),
        (Action.QUEUE, "decode-0"),
        (Action.HANDOFF, "decode-0"),
    ]
    queue, compute, waiting, moved = (part.seconds for part in plan.parts)
    assert queue == pytest.approx(0.02 + CURVE.seconds(400, 0))
    assert compute == pytest.approx(CURVE.seconds(2000, 0))
    assert waiting == pytest.approx(2 * 0.02)
    assert moved == pytest.approx(LINK.seconds(2000 * TOKEN_BYTES))


def test_what_takes_no_time_is_no_part() -> None:
    """An idle replica has no queue, and without tiers nothing is fetched."""
    plan = choose(question(100, None, IDLE))
    assert plan.parts == (Part(Action.COMPUTE, "decode-0", 0.0, plan.predicted_ttft_s),)


def test_a_fetch_comes_before_what_is_computed_behind_it() -> None:
    """The tier's blocks first, then the suffix."""
    held = replace(IDLE, tiers=(TierView(Tier.HOST, HOST, 960),))
    plan = choose(question(2000, None, held))
    assert shown(plan) == [(Action.FETCH, "decode-0"), (Action.COMPUTE, "decode-0")]
    assert plan.parts[0].seconds == pytest.approx(HOST.seconds(960 * TOKEN_BYTES))


def test_a_policy_that_prices_nothing_gives_no_parts() -> None:
    """The kill switch looks at no costs."""
    assert least_loaded.choose(question(2000, IDLE, IDLE)).parts == ()


views = st.builds(
    ReplicaView,
    name=st.just(""),
    curve=st.sampled_from([CURVE, PrefillCurve(0.0, 0.001, 0.0)]),
    step_s=st.sampled_from([0.0, 0.02]),
    queued_prefills=st.integers(0, 3),
    queued_tokens=st.sampled_from([0, 100, 3000]),
    waiting=st.integers(0, 2),
    running=st.integers(0, 4),
    max_num_seqs=st.integers(1, 4),
    hit_tokens=st.integers(0, 6).map(lambda blocks: 160 * blocks),
    tiers=st.sampled_from([(), (TierView(Tier.HOST, HOST, 960),)]),
)


@given(st.integers(1, 3000), st.none() | views, views)
def test_parts_end_where_the_prediction_does(
    n: int, prefill: ReplicaView | None, decode: ReplicaView
) -> None:
    """Whatever the plan: they follow each other from its start to its predicted first token."""
    plan = choose(question(n, prefill, decode))
    ends = [0.0, *(part.end_s for part in plan.parts)]
    assert [part.start_s for part in plan.parts] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(plan.predicted_ttft_s)
    assert {part.replica for part in plan.parts} <= {plan.prefill, plan.decode}


def test_parts_may_begin_later() -> None:
    """Those of a second replica begin when its turn comes."""
    parts = in_turn([(Action.QUEUE, "a", 0.0), (Action.STEP, "a", 2.0)], start_s=1.0)
    assert parts == (Part(Action.STEP, "a", 1.0, 2.0),)
    assert parts[0].end_s == 3.0
