"""What the load benchmark sends, and what its rows say of what came back."""

from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.breakeven.arrivals import Kind, Mix, Piece, Request, schedule, tokens
from benchmarks.breakeven.goodput import (
    AFFINITY,
    POLICIES,
    Targets,
    Window,
    quotient,
    rows,
    targets,
    unit_per_s,
)
from benchmarks.breakeven.load import FULL, turns
from benchmarks.breakeven.sending import mean_tokens

MIX = Mix()
LONE = {"ttft_s": {"agent": [1.0], "document": [2.0], "chat": [0.25]}, "gaps_s": [0.02]}


def of_kind(requests: list[Request], kind: Kind) -> list[Request]:
    return [request for request in requests if request.kind is kind]


def sent(kind: str, ttft_s: float | None, gap_s: float | None = 0.02) -> dict[str, Any]:
    return {"kind": kind, "ttft_s": ttft_s, "gap_s": gap_s}


def windows(good: dict[str, dict[float, int]], rounds: int = 1) -> list[Window]:
    """Windows of 10 s with so many good requests, and one that never was answered."""
    never = sent("chat", None, None)
    return [
        Window(policy, factor, number, 10.0, [*[sent("chat", 0.1)] * count, never])
        for policy, curve in good.items()
        for factor, count in curve.items()
        for number in range(rounds)
    ]


# ------------------------------------------------------------------ arrivals


@given(st.floats(0.1, 20.0), st.floats(1.0, 60.0), st.integers(0, 1000))
def test_as_many_arrive_as_the_rate_says(per_s: float, seconds: float, seed: int) -> None:
    """In order, within the window, and the same for the same seed."""
    requests = schedule(MIX, per_s, seconds, seed)
    assert len(requests) == max(1, round(per_s * seconds))
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] <= seconds
    assert requests == schedule(MIX, per_s, seconds, seed)


def test_kinds_have_their_shares() -> None:
    """Of many arrivals, each kind about as many as the mix says."""
    counted = Counter(request.kind for request in schedule(MIX, 10.0, 500.0, 3))
    for kind, share in MIX.shares().items():
        assert counted[kind] / 5000 == pytest.approx(share, abs=0.03)


def test_gaps_between_arrivals_are_those_of_a_poisson_process() -> None:
    """As varied as their mean is long, and no pace: the share of short ones is exponential's."""
    times = [request.at_s for request in schedule(MIX, 5.0, 1000.0, 7)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    short = sum(gap < 0.1 for gap in gaps) / len(gaps)
    assert short == pytest.approx(0.393, abs=0.03)


def test_an_agents_turn_resends_all_that_was_said() -> None:
    """Each turn is new, begins as all agents do, or goes on exactly where an earlier one ended."""
    turns_ = [request.pieces for request in of_kind(schedule(MIX, 2.0, 200.0, 1), Kind.AGENT)]
    system = turns_[0][0]
    for at, turn in enumerate(turns_):
        assert turn[0] == system
        assert sum(piece.tokens for piece in turn) <= MIX.talk_tokens
        assert len(turn) == 2 or turn[:-1] in turns_[:at]
    assert max(map(len, turns_)) > 4


def test_a_document_is_asked_about_so_often_and_then_no_more() -> None:
    """Always by another question, and a few documents at a time."""
    asked = [r.pieces for r in of_kind(schedule(MIX, 2.0, 400.0, 2), Kind.DOCUMENT)]
    counted = Counter(document for document, _ in asked)
    assert set(counted.values()) <= {1, 2, MIX.asks}
    assert MIX.asks in counted.values()
    assert sum(count < MIX.asks for count in counted.values()) <= MIX.open_documents
    assert len({question for _, question in asked}) == len(asked)


def test_chats_share_nothing() -> None:
    """No two begin alike."""
    firsts = [r.pieces[0] for r in of_kind(schedule(MIX, 2.0, 200.0, 5), Kind.CHAT)]
    assert len(set(firsts)) == len(firsts)


def test_equal_pieces_are_equal_tokens_within_a_text_alone() -> None:
    """A prefix is shared where pieces are; another window's tokens are others."""
    first, second = Piece(1, 40), Piece(2, 8)
    assert tokens((first, second), "a")[:40] == tokens((first,), "a")
    assert len(tokens((first, second), "a")) == 48
    assert tokens((first,), "a") != tokens((first,), "b")


def test_mean_prompts_lie_between_least_and_most() -> None:
    """What targets are measured with is a prompt that there is."""
    mean = mean_tokens(MIX)
    assert MIX.system_tokens < mean[Kind.AGENT] < MIX.talk_tokens
    assert MIX.chat_tokens[0] < mean[Kind.CHAT] < MIX.chat_tokens[1]
    assert mean[Kind.DOCUMENT] > MIX.document_tokens[0]


def test_each_policy_meets_each_rate_in_each_place() -> None:
    """Every window once, and no policy always first."""
    order = turns(FULL)
    assert sorted(order) == sorted(product(POLICIES, FULL.factors, range(FULL.rounds)))
    firsts = Counter(order[at][0] for at in range(0, len(order), len(POLICIES)))
    assert len(firsts) == len(POLICIES)


# ------------------------------------------------------------------ goodput


def test_a_good_request_meets_both_targets() -> None:
    """Each kind its own time to the first token; one that is not answered is not good."""
    wanted = targets(LONE, 3.0)
    assert wanted == Targets({"agent": 3.0, "document": 6.0, "chat": 0.75}, pytest.approx(0.06))
    assert wanted.met(sent("document", 5.0))
    assert not wanted.met(sent("agent", 5.0))
    assert wanted.met(sent("chat", 0.75, 0.059))
    assert not wanted.met(sent("chat", 0.7, 0.061))
    never = sent("chat", None, None)
    assert (wanted.met(never), wanted.late(never), wanted.slow(never)) == (False, True, False)


def test_the_unit_is_what_one_engine_computes_whole() -> None:
    """Seconds of each kind by its share."""
    shares = {"agent": 0.5, "document": 0.25, "chat": 0.25}
    assert unit_per_s(LONE, shares) == pytest.approx(1 / (0.5 + 0.5 + 0.0625))


def test_each_policy_counts_at_its_own_best_rate() -> None:
    """Ours has 60 good ones at 3, affinity 50 at 2: 1.2; over all rates 120 to 100."""
    good = {policy: {1.0: 20, 2.0: 40, 3.0: 60} for policy in POLICIES}
    good[AFFINITY] = {1.0: 20, 2.0: 50, 3.0: 30}
    found = {row.name: row for row in rows(windows(good, 3), (3.0, 2.0), LONE)}
    best = found[f"goodput against {AFFINITY}, at each one's best rate, targets 3x"]
    every = found[f"goodput against {AFFINITY}, over all rates, targets 3x"]
    assert (best.value, best.target, best.ok) == (1.2, 1.15, True)
    assert (every.value, every.ok) == (1.2, True)
    assert found["goodput against always_compute, over all rates, targets 3x"].ok
    assert not found["goodput against threshold, over all rates, targets 3x"].ok


def test_the_detail_tells_each_round() -> None:
    """One round in which ours was worse shows, though the mean is what counts."""
    even = {policy: {1.0: 40} for policy in POLICIES}
    second = [
        Window(w.policy, w.factor, 1, w.seconds, w.sent[:20] if w.policy == AFFINITY else w.sent)
        for w in windows(even)
    ]
    found = rows([*windows(even), *second], (3.0,), LONE)
    detail = next(row.detail for row in found if AFFINITY in row.name)
    assert "1..2" in detail
    assert "of 2" in detail


def test_stricter_targets_have_no_targets_of_their_own() -> None:
    """They are shown: the issue's hold for the first multiple."""
    found = rows(windows({policy: {1.0: 4} for policy in POLICIES}), (3.0, 2.0), LONE)
    assert all(row.target is None for row in found if row.name.endswith("2x"))
    assert sum(row.target is not None for row in found) == 6


def test_nothing_against_nothing_is_even() -> None:
    """A rate at which no policy has a good request decides nothing."""
    assert quotient(0.0, 0.0) == 1.0
    assert quotient(1.0, 0.0) == float("inf")
    assert quotient(1.0, 2.0) == 0.5
