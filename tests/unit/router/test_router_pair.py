import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.curve import LinkCurve, PrefillCurve
from kv.plan import Plan, Reason, Shape, Source, Span
from router.errors import NoReplicaError
from router.policy.pair import Question, choose
from router.snapshot import ReplicaView, Snapshot

# 1,000 tokens take about 0.5 s to compute and 0.15 s to move.
CURVE = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.05, 1e-9)
TOKEN_BYTES = 100_000
IDLE = ReplicaView("", CURVE, 0.02, 0, 0, 0, 0, 32, 0)


def views(role: str, changes: list[dict[str, object]]) -> tuple[ReplicaView, ...]:
    return tuple(
        replace(IDLE, name=f"{role}-{index}", **change) for index, change in enumerate(changes)
    )


def plan_of(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    local_only: bool = False,
    cold: frozenset[tuple[str, str]] = frozenset(),
) -> Plan:
    """The plan where each dict is what differs from an idle replica, and all but `cold` is warm."""
    ps, ds = views("prefill", prefill), views("decode", decode)
    pairs = {(p.name, d.name): LINK for p in ps for d in ds if (p.name, d.name) not in cold}
    return choose(Question(prompt_tokens, Snapshot(ps, ds, pairs, TOKEN_BYTES), 0.5, local_only))


@pytest.mark.parametrize(
    ("case", "prompt_tokens", "prefill", "decode", "chosen"),
    [
        ("idle: a long prompt is computed on P", 1000, [{}], [{}], ("prefill-0", "decode-0")),
        ("idle: a tiny one is not worth a handoff", 10, [{}], [{}], (None, "decode-0")),
        ("P has a queue", 1000, [{"queued_tokens": 4000}], [{}], (None, "decode-0")),
        ("requests wait at P", 1000, [{"waiting": 50}], [{}], (None, "decode-0")),
        ("D has the prefix", 1000, [{}], [{"hit_tokens": 960}], (None, "decode-0")),
        ("P has the prefix", 600, [{"hit_tokens": 592}], [{}], ("prefill-0", "decode-0")),
        ("the idler P", 1000, [{"queued_tokens": 500}, {}], [{}], ("prefill-1", "decode-0")),
        ("the idler D", 1000, [{}], [{"running": 3}, {"running": 1}], ("prefill-0", "decode-1")),
        ("D stalls nobody", 10, [{}], [{"running": 9}, {}], (None, "decode-1")),
        ("a full D", 1000, [{}], [{"running": 32}, {"running": 31}], ("prefill-0", "decode-1")),
        (
            "a loaded holder loses to recompute where that is faster",
            1000,
            [{"hit_tokens": 992, "queued_tokens": 3000}, {}],
            [{}],
            ("prefill-1", "decode-0"),
        ),
        (
            "a holder wins over an idle replica while its queue is shorter than the prefix",
            1000,
            [{"hit_tokens": 992, "queued_tokens": 500}, {}],
            [{}],
            ("prefill-0", "decode-0"),
        ),
        (
            "many streams on the holder outweigh its hit",
            1000,
            [{}],
            [{"hit_tokens": 800, "running": 30}, {}],
            ("prefill-0", "decode-1"),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_the_cheapest_pair_is_chosen(
    case: str,
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    chosen: tuple[str | None, str],
) -> None:
    """The table says who serves in each situation."""
    plan = plan_of(prompt_tokens, prefill, decode)
    assert (plan.prefill, plan.decode) == chosen, case
    assert plan.shape is (Shape.LOCAL if chosen[0] is None else Shape.REMOTE)


def test_a_remote_prediction_is_queue_compute_and_link() -> None:
    """TTFT is P's queue, the compute behind P's hit, and moving what D lacks."""
    prefill = [{"hit_tokens": 320, "queued_tokens": 100, "waiting": 1}]
    plan = plan_of(2000, prefill, [{"hit_tokens": 160}])
    queue_s = CURVE.seconds(100, 0) + 0.02
    link_s = LINK.seconds((2000 - 160) * TOKEN_BYTES)
    assert plan.shape is Shape.REMOTE
    assert plan.predicted_ttft_s == pytest.approx(queue_s + CURVE.seconds(1680, 320) + link_s)
    hit = Span(Source.HIT, 0, 320, "prefill-0")
    assert plan.spans == (hit, Span(Source.COMPUTE, 320, 2000, "prefill-0"))


def test_a_local_plan_is_charged_for_the_streams_it_stalls() -> None:
    """The prefill costs once more for each stream beside it, and a tenth for its compute."""
    plan = plan_of(1000, [], [{"running": 4}])
    compute_s = CURVE.seconds(1000, 0)
    assert plan.predicted_ttft_s == pytest.approx(compute_s)
    assert plan.cost_s == pytest.approx(compute_s * 5.1 + 4 * 0.02)


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    """No engine can answer without the logits of the last token."""
    plan = plan_of(64, [], [{"hit_tokens": 64}])
    assert plan.spans[-1] == Span(Source.COMPUTE, 63, 64, "decode-0")


@pytest.mark.parametrize(
    ("prefill", "decode", "local_only", "reason"),
    [
        ([], [{}], False, Reason.ONLY_REPLICA),
        ([], [{}, {}], False, Reason.NO_PREFILL_REPLICA),
        ([{}], [{}], True, Reason.PROMPT_LOGPROBS),
        ([{}], [{}], False, Reason.CHEAPER_REMOTE),
        ([{"queued_tokens": 9000}], [{}], False, Reason.CHEAPER_LOCAL),
    ],
)
def test_the_reason_says_why(
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    local_only: bool,
    reason: Reason,
) -> None:
    """Each situation has its word."""
    assert plan_of(1000, prefill, decode, local_only).reason is reason


def test_prompt_logprobs_are_made_where_the_answer_is() -> None:
    """A local_only request never uses P, however long."""
    plan = plan_of(30_000, [{}], [{}, {}], local_only=True)
    assert plan.prefill is None
    assert all(rival.prefill is None for rival in plan.rivals)


@pytest.mark.parametrize("prefill", [[], [{}], [{}, {}]])
def test_without_a_decode_replica_nobody_serves(prefill: list[dict[str, object]]) -> None:
    """The error counts who is up."""
    with pytest.raises(NoReplicaError, match=f"0 decode and {len(prefill)} prefill"):
        plan_of(1000, prefill, [])


replica_changes = st.fixed_dictionaries(
    {
        "queued_tokens": st.integers(0, 5000),
        "waiting": st.integers(0, 5),
        "running": st.integers(0, 40),
        "hit_tokens": st.integers(0, 120).map(lambda blocks: 16 * blocks),
    }
)
# Few values, so that replicas tie.
tied_changes = st.fixed_dictionaries({"running": st.integers(0, 1)})
pools = st.lists(replica_changes | tied_changes, max_size=4)


@given(st.integers(1, 4000), pools, pools.filter(bool), st.randoms(use_true_random=False))
def test_the_order_of_replicas_does_not_matter(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    rng: random.Random,
) -> None:
    """Equal snapshots give equal plans, rivals and all, however they are listed."""
    ps, ds = views("prefill", prefill), views("decode", decode)
    links = {(p.name, d.name): LINK for p in ps for d in ds}
    plans = []
    for _ in range(2):
        shuffled = rng.sample(ps, len(ps)), rng.sample(ds, len(ds))
        pairs = dict(rng.sample(sorted(links.items()), len(links)))
        snapshot = Snapshot(*map(tuple, shuffled), pairs, TOKEN_BYTES)
        plans.append(choose(Question(prompt_tokens, snapshot, 0.5)))
    assert plans[0] == plans[1]


@given(st.integers(1, 4000), pools, pools.filter(bool), st.data())
def test_an_unwarmed_pair_is_never_in_a_plan(
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    data: st.DataObject,
) -> None:
    """Neither chosen nor a rival; and whatever is cold, D alone can serve."""
    pairs = [
        (f"prefill-{p}", f"decode-{d}") for p in range(len(prefill)) for d in range(len(decode))
    ]
    cold = frozenset(data.draw(st.sets(st.sampled_from(pairs))) if pairs else ())
    plan = plan_of(prompt_tokens, prefill, decode, cold=cold)
    used = [(plan.prefill, plan.decode), *((r.prefill, r.decode) for r in plan.rivals)]
    assert not cold & set(used)
    assert len(used) == len(decode) + len(pairs) - len(cold)


@given(st.integers(1, 4000), pools, pools.filter(bool))
def test_the_chosen_plan_is_the_cheapest_and_tiles_the_prompt(
    prompt_tokens: int, prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> None:
    """No rival costs less, rivals are in order, and the spans end with the prompt."""
    plan = plan_of(prompt_tokens, prefill, decode)
    costs = [plan.cost_s, *(rival.cost_s for rival in plan.rivals)]
    assert costs == sorted(costs)
    assert plan.spans[-1].end_token == prompt_tokens


def test_a_snapshot_without_a_replica_lacks_it() -> None:
    """Replicas that failed a request are left out; the last decode replicas never are."""
    ps, ds = views("prefill", [{}]), views("decode", [{}, {}])
    snapshot = Snapshot(ps, ds, {}, TOKEN_BYTES)
    assert snapshot.without(()) == snapshot
    assert snapshot.without({"prefill-0", "decode-1"}) == replace(
        snapshot, prefill=(), decode=ds[:1]
    )
    assert snapshot.without({"decode-0", "decode-1"}).decode == ds


def test_ten_queued_prompts_cost_ten_prefills() -> None:
    """A queue is priced prompt by prompt: the quadratic term applies to each, not to their sum."""
    many = plan_of(1000, [{"queued_tokens": 40_000, "queued_prefills": 10}], [{"running": 31}])
    one = plan_of(1000, [{"queued_tokens": 4_000, "queued_prefills": 1}], [{"running": 31}])
    idle = plan_of(1000, [{}], [{"running": 31}])
    remote = [next(t for t in (p, *p.rivals) if t.prefill) for p in (idle, one, many)]
    waits = [each.predicted_ttft_s - remote[0].predicted_ttft_s for each in remote]
    assert waits[2] == pytest.approx(10 * waits[1])
