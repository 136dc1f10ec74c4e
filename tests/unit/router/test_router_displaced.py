"""What a plan pushes out of full caches is part of its cost."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.plan import Plan, Shape
from router.columns import Columns, Displaced
from router.policy import split
from router.policy.pair import choose
from router.policy.question import Question
from router.snapshot import ReplicaView, Snapshot, TierView
from tests.unit.router.test_router_pair import CURVE, LINK, TOKEN_BYTES, priced, snapshots, views
from tests.unit.router.test_router_split import POOLS, PROMPTS, all_splits, asked

# (room in tokens, seconds a token) of a replica.
Room = tuple[float, float]
ROOMS = st.tuples(st.sampled_from([0.0, 100.0, 1000.0, 1e6]), st.sampled_from([0.0, 1e-4, 2e-3]))


def with_rooms(snapshot: Snapshot, rooms: dict[str, Room]) -> Snapshot:
    columns = Columns.of(snapshot.decode, snapshot.prefill, snapshot.links)
    free, per_token = np.array([rooms[name] for name in columns.names]).T
    return replace(snapshot, columns=columns._replace(displaced=Displaced(free, per_token)))


def pushed_s(n: int, replica: ReplicaView, rooms: dict[str, Room]) -> float:
    """By the definition: tokens that are new there, less those it has room for."""
    room, per_token_s = rooms[replica.name]
    return max(0.0, n - min(replica.hit_tokens, n - 1) - room) * per_token_s


@given(st.integers(1, 2000), snapshots(), st.data(), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_plan_is_charged_for_what_it_displaces(
    n: int, snapshot: Snapshot, data: st.DataObject, price: float
) -> None:
    """Against every plan one by one: `local` on D, `remote` on D and on P; the prediction of the
    time to the first token is no other than without."""
    ps, ds = ({view.name: view for view in pool} for pool in (snapshot.prefill, snapshot.decode))
    assume(not set(ds) & set(ps))  # a name stands for one replica
    rooms = {name: data.draw(ROOMS) for name in (*ds, *ps)}
    plans = {}
    for (shape, d, p), (cost_s, ttft_s) in priced(n, snapshot).items():
        more_s = pushed_s(n, ds[d], rooms) + (pushed_s(n, ps[p], rooms) if p else 0.0)
        plans[shape, d, p] = cost_s + price * more_s, ttft_s
    asked_for = Question(n, with_rooms(snapshot, rooms), 0.5, displaced_price=price)
    plan = choose(asked_for)
    found = str(plan.shape), plan.decode, plan.prefill or ""
    assert (plan.cost_s, plan.predicted_ttft_s) == pytest.approx(plans[found], rel=1e-9)
    assert plan.cost_s <= min(cost_s for cost_s, _ in plans.values()) * (1.0 + 2e-9)


def full(rooms: dict[str, Room], running: int = 0) -> Plan:
    """A prompt of 2,000 tokens for one P, and one D that runs so many streams."""
    ps, ds = views("prefill", [{}]), views("decode", [{"running": running}])
    snapshot = Snapshot(ps, ds, {(ps[0].name, ds[0].name): LINK}, TOKEN_BYTES)
    return choose(Question(2000, with_rooms(snapshot, rooms), 0.5))


def test_a_handoff_holds_a_prompt_twice() -> None:
    """Where both caches are full of what will be asked for again, D alone computes what would
    otherwise be handed off."""
    roomy = {"prefill-0": (1e6, 4e-4), "decode-0": (1e6, 4e-4)}
    assert full(roomy).shape is Shape.REMOTE
    assert full({**roomy, "decode-0": (0.0, 4e-4)}).shape is Shape.REMOTE  # D has it either way
    assert full(dict.fromkeys(roomy, (0.0, 0.0004))).shape is Shape.LOCAL
    assert full(dict.fromkeys(roomy, (0.0, 0.0))).shape is Shape.REMOTE


@given(PROMPTS, POOLS, POOLS, st.data(), st.floats(0.0, 0.5))
def test_a_split_is_charged_likewise(
    n: int, prefill: Any, decode: Any, data: st.DataObject, price: float
) -> None:
    """Against each block boundary of each tier of each pair: D takes the whole prompt in, P its
    head, which counts in full where P has no room for the prompt."""
    made = asked(n, prefill, decode, compute_price=price)
    ds, ps = made.snapshot.decode, made.snapshot.prefill
    rooms = {view.name: data.draw(ROOMS) for view in (*ds, *ps)}
    costs = []
    for d in ds:
        for p in ps:
            hit = min(p.hit_tokens, n - 1)
            per_token_s = rooms[p.name][1] if pushed_s(n, p, rooms) else 0.0
            for each in all_splits(made, d, p):
                head_s = per_token_s * (each.split_tokens - hit)
                costs.append(each.cost_s + pushed_s(n, d, rooms) + head_s)
    snapshot = with_rooms(made.snapshot, rooms)
    assert snapshot.columns is not None
    found = split.better(replace(made, snapshot=snapshot), snapshot.columns, 1e9)
    assert (found is None) is (not costs)
    if found is not None:
        assert found.cost_s == pytest.approx(min(costs))


def test_what_is_displaced_costs_what_bringing_it_back_takes() -> None:
    """Computing, or the tier that is fastest; times the chance that it is asked for."""
    host = (TierView(Tier.HOST, LinkCurve(0.005, 1e-9)), TierView(Tier.DISK, LinkCurve(0.0, 1e-8)))
    rows = views("decode", [{}, {"tiers": host}])
    found = Displaced.of(rows, [640, 0], 0.25, TOKEN_BYTES)
    assert found is not None
    assert found.free_tokens.tolist() == [640.0, 0.0]
    assert found.per_token_s == pytest.approx([0.25 * CURVE.per_token_s, 0.25e-9 * TOKEN_BYTES])
    assert found.seconds(np.array([1000.0, 1000.0]))[0] == pytest.approx(0.25 * 0.0005 * 360)
    assert found.seconds(np.array([600.0, 1000.0]))[0] == 0.0
    assert Displaced.of(rows, [640, 0], 0.0, TOKEN_BYTES) is None
