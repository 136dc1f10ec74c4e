import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.plan import Plan, Reason, Shape, Source, Span
from router.errors import NoReplicaError
from router.policy.pair import MAX_RIVALS, Question, choose
from router.policy.session import affinity
from router.snapshot import Pool, ReplicaView, Snapshot, TierView

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
    assert len(used) == min(1 + MAX_RIVALS, len(decode) + len(pairs) - len(cold))


@given(st.integers(1, 4000), pools, pools.filter(bool))
def test_the_chosen_plan_is_the_cheapest_and_tiles_the_prompt(
    prompt_tokens: int, prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> None:
    """No rival costs less, rivals are in order, and the spans end with the prompt."""
    plan = plan_of(prompt_tokens, prefill, decode)
    costs = [rival.cost_s for rival in plan.rivals]
    assert costs == sorted(costs)
    assert all(plan.cost_s <= cost * (1 + 1e-9) for cost in costs)
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


def seconds(n: int, replica: ReplicaView) -> float:
    """To compute a prompt there."""
    hit = min(replica.hit_tokens, n - 1)
    return replica.curve.seconds(n - hit, hit)


def priced(n: int, snapshot: Snapshot) -> dict[tuple[str, str, str], tuple[float, float]]:
    """The cost and the time to first token of every plan, one at a time."""
    plans = {}
    for d in snapshot.decode:
        own_s = seconds(n, d)
        ttft_s = d.queue_s + own_s
        stalled_s = (max(d.running, 0.5) + 0.1) * own_s
        plans["local", d.name, ""] = (ttft_s + stalled_s + d.crowding_s, ttft_s)
        for p in snapshot.prefill:
            link = snapshot.links.get((p.name, d.name))
            if link is None:
                continue
            lacked = n - min(d.hit_tokens, n - 1)
            ttft_s = p.queue_s + seconds(n, p) + d.waiting * d.step_s
            ttft_s += link.seconds(lacked * snapshot.kv_bytes_per_token)
            plans["remote", d.name, p.name] = (
                ttft_s + 0.1 * seconds(n, p) + d.crowding_s,
                ttft_s,
            )
    return plans


curves = st.sampled_from([CURVE, PrefillCurve(0.0, 0.001, 0.0), PrefillCurve(0.1, 0.0001, 1e-7)])
link_curves = st.sampled_from([LINK, LinkCurve(0.0, 0.0), LinkCurve(0.01, 1e-8)])
# Few values again, so that plans tie, and prompts shorter than a hit.
some_views = st.builds(
    ReplicaView,
    name=st.sampled_from([f"{letter}-{number}" for letter in "abc" for number in range(12)]),
    curve=curves,
    step_s=st.sampled_from([0.0, 0.02]),
    queued_prefills=st.integers(0, 3),
    queued_tokens=st.sampled_from([0, 100, 3000]),
    waiting=st.integers(0, 2),
    running=st.integers(0, 4),
    max_num_seqs=st.integers(1, 4),
    hit_tokens=st.integers(0, 6).map(lambda blocks: 160 * blocks),
)
some_pools = st.lists(some_views, max_size=5, unique_by=lambda view: view.name).map(tuple)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any cluster with a decode replica; some pairs are not warmed."""
    ps, ds = draw(some_pools), draw(some_pools.filter(bool))
    pairs = {(p.name, d.name): draw(link_curves | st.none()) for p in ps for d in ds}
    links = {pair: link for pair, link in pairs.items() if link is not None}
    return Snapshot(ps, ds, links, draw(st.sampled_from([0, TOKEN_BYTES])))


@given(st.integers(1, 2000), snapshots())
def test_pricing_all_at_once_is_pricing_one_by_one(n: int, snapshot: Snapshot) -> None:
    """The plan is the first of the cheapest by shape and names; rivals are the cheapest others, the
    last of them of the other shape if else none were."""
    plans = priced(n, snapshot)
    least_s = min(cost_s for cost_s, _ in plans.values())
    first = min(key for key, (cost_s, _) in plans.items() if cost_s <= least_s * (1 + 1e-9))
    plan = choose(Question(n, snapshot, 0.5))
    assert (plan.shape, plan.decode, plan.prefill or "") == first
    assert (plan.cost_s, plan.predicted_ttft_s) == pytest.approx(plans.pop(first), rel=1e-9)
    rivals = [(r.shape, r.decode, r.prefill or "") for r in plan.rivals]
    cheapest = sorted(cost_s for cost_s, _ in plans.values())[:MAX_RIVALS]
    costs = [plans[rival][0] for rival in rivals]
    assert costs[:-1] == pytest.approx(cheapest[:-1], rel=1e-9)
    other = [cost_s for (shape, *_), (cost_s, _) in plans.items() if shape != plan.shape]
    assert any(rival.shape != plan.shape for rival in plan.rivals) == bool(other)
    lasts = [*cheapest[-1:], *([min(other)] if other else [])]
    assert not costs or any(costs[-1] == pytest.approx(last, rel=1e-9) for last in lasts)
    assert len(costs) == len(cheapest)
    for rival, key in zip(plan.rivals, rivals, strict=True):
        assert (rival.cost_s, rival.predicted_ttft_s) == pytest.approx(plans[key], rel=1e-9)


keys = st.binary(min_size=16, max_size=16)


@given(st.integers(1, 2000), snapshots(), keys, st.sampled_from([0.0, 0.1, 1.0]))
def test_a_session_costs_no_more_than_its_slack(
    n: int, snapshot: Snapshot, key: bytes, slack: float
) -> None:
    """Its plan is within the slack of the cheapest, and the reason says when they differ."""
    cheapest = choose(Question(n, snapshot, 0.5))
    plan = choose(Question(n, snapshot, 0.5, affinity=key, session_slack=slack))
    assert plan.cost_s <= cheapest.cost_s * (1 + max(slack, 1e-9)) * (1 + 1e-12)
    same = (plan.prefill, plan.decode) == (cheapest.prefill, cheapest.decode)
    assert same == (plan.reason is not Reason.SESSION)
    assert plan == choose(Question(n, snapshot, 0.5, affinity=key, session_slack=slack))


def alike(n_prefill: int, n_decode: int, loads: dict[str, int]) -> Snapshot:
    """Idle replicas but for the streams that `loads` has some run."""
    ps, ds = views("prefill", [{}] * n_prefill), views("decode", [{}] * n_decode)
    ds = tuple(replace(d, running=loads.get(d.name, 0)) for d in ds)
    links = {(p.name, d.name): LINK for p in ps for d in ds}
    return Snapshot(ps, ds, links, TOKEN_BYTES)


def home(snapshot: Snapshot, key: bytes, n: int = 4000) -> tuple[str | None, str]:
    plan = choose(Question(n, snapshot, 0.5, affinity=key))
    return plan.prefill, plan.decode


@given(keys, st.integers(3000, 5000), st.integers(0, 7))
def test_turns_of_a_session_keep_to_one_replica(key: bytes, n: int, busy: int) -> None:
    """A longer prompt and a stream more, which cost within the slack, change nothing."""
    first = home(alike(4, 8, {}), key)
    assert home(alike(4, 8, {f"decode-{busy}": 1}), key, n) == first


@given(keys, st.integers(0, 7), st.integers(0, 3))
def test_a_replica_that_leaves_moves_only_its_own_sessions(key: bytes, d: int, p: int) -> None:
    """Whoever was on another pair stays there."""
    snapshot = alike(4, 8, {})
    prefill, decode = home(snapshot, key)
    if decode != f"decode-{d}":
        assert home(snapshot.without({f"decode-{d}"}), key) == (prefill, decode)
    assume(prefill != f"prefill-{p}")
    assert home(snapshot.without({f"prefill-{p}"}), key) == (prefill, decode)


def test_sessions_are_spread() -> None:
    """A hundred sessions on idle replicas use each of eight decode replicas."""
    snapshot = alike(4, 8, {})
    homes = [home(snapshot, bytes([number] * 16))[1] for number in range(100)]
    assert {homes.count(f"decode-{index}") > 3 for index in range(8)} == {True}


def test_without_a_key_the_cheapest_is_taken() -> None:
    """However near the others are."""
    plan = choose(Question(4000, alike(2, 2, {"decode-0": 1}), 0.5))
    assert (plan.decode, plan.reason) == ("decode-1", Reason.CHEAPER_REMOTE)


def test_tenants_do_not_share_a_session() -> None:
    """The same key of two tenants, and ways to write it across the border, are all different."""
    named = [
        affinity("a", "bc"),
        affinity("ab", "c"),
        affinity("", "abc"),
        affinity("a", "b\ud800"),
    ]
    assert len(set(named)) == 4
    assert affinity("a", None) is None


@given(some_pools)
def test_a_pool_is_its_rows_with_their_hits(rows: tuple[ReplicaView, ...]) -> None:
    """Other policies read rows, by place, in slices and one after another."""
    without = [replace(row, hit_tokens=0) for row in rows]
    pool = Pool(without, np.array([float(row.hit_tokens) for row in rows]))
    assert tuple(pool) == rows
    assert tuple(pool[at] for at in range(-len(rows), 0)) == rows
    assert tuple(pool[1:]) == rows[1:]


def batch_plan(
    prompt_tokens: int, prefill: list[dict[str, object]], decode: list[dict[str, object]]
) -> Plan:
    ps, ds = views("prefill", prefill), views("decode", decode)
    pairs = {(p.name, d.name): LINK for p in ps for d in ds}
    snapshot = Snapshot(ps, ds, pairs, TOKEN_BYTES)
    return choose(Question(prompt_tokens, snapshot, 0.5, yields=True))


HELD_SLOWLY = TierView(Tier.HOST, LinkCurve(0.9, 0.0), 960)


@pytest.mark.parametrize(
    ("case", "prompt_tokens", "prefill", "decode", "chosen"),
    [
        ("a queue costs nobody", 1000, [{"queued_tokens": 4000}], [{}], ("prefill-0", "decode-0")),
        ("the idler of two", 1000, [{"queued_tokens": 50}, {}], [{}], ("prefill-1", "decode-0")),
        (
            "a hit behind a long queue saves computing",
            1000,
            [{"hit_tokens": 800, "queued_tokens": 4000}, {}],
            [{"running": 2}],
            ("prefill-0", "decode-0"),
        ),
        (
            "the one with less batch work",
            1000,
            [{"yielding": 1}, {}],
            [{}],
            ("prefill-1", "decode-0"),
        ),
        (
            "streams of people are stalled at their price",
            1000,
            [],
            [{"running": 3}, {"queued_tokens": 3000}],
            (None, "decode-1"),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_batch_request_is_planned_by_what_it_costs(
    case: str,
    prompt_tokens: int,
    prefill: list[dict[str, object]],
    decode: list[dict[str, object]],
    chosen: tuple[str | None, str],
) -> None:
    """The table says who serves one that nobody waits for."""
    plan = batch_plan(prompt_tokens, prefill, decode)
    assert (plan.prefill, plan.decode) == chosen, case


def test_a_batch_request_waits_for_a_fetch_rather_than_computes() -> None:
    """A tier that takes 0.9 s for what is computed in 0.5 s: a person's prompt is computed, a batch
    prompt is fetched, and not given up once computing would have been done; what is predicted is in
    real seconds either way."""
    decode: list[dict[str, object]] = [{"tiers": (HELD_SLOWLY,)}]
    person, batch = plan_of(1000, [], decode), batch_plan(1000, [], decode)
    assert person.shape is Shape.LOCAL
    assert batch.shape is Shape.FETCH
    assert batch.predicted_ttft_s == pytest.approx(0.9 + CURVE.seconds(40, 960))
    assert batch.hints.deadline_s == pytest.approx(2 * 0.9)
    assert batch.cost_s < person.cost_s


def test_a_batch_prediction_is_in_seconds() -> None:
    """Prices rank plans; they do not change what is predicted of the one that is chosen."""
    prefill: list[dict[str, object]] = [{"hit_tokens": 320, "queued_tokens": 100, "waiting": 1}]
    decode: list[dict[str, object]] = [{"hit_tokens": 160}]
    person, batch = plan_of(2000, prefill, decode), batch_plan(2000, prefill, decode)
    assert batch.predicted_ttft_s == person.predicted_ttft_s
    assert (batch.shape, batch.spans) == (person.shape, person.spans)


def test_what_gives_way_is_no_queue_to_people() -> None:
    """A replica full of batch requests is as good to them as an idle one."""
    busy = plan_of(1000, [{"yielding": 30}], [{}])
    assert busy == plan_of(1000, [{}], [{}])
