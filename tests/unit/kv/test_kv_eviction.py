"""Which block goes first, and what that costs."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv import reuse
from kv.curve import PrefillCurve
from kv.errors import VaultError
from kv.eviction import Entry, Leaves, Lru, Rank, ValueDensity, recompute_s
from kv.reuse import CAP, EDGES_S, HORIZON_S, KINDS, ReuseHistory, kind_of

CURVE = PrefillCurve(0.1, 1e-3, 1e-6)


def entry(key: bytes, *, last_used_s: float = 0.0, seconds_saved: float = 1.0, n_bytes: int = 1):
    return Entry(key, None, "a", n_bytes, seconds_saved, last_used_s)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=9))
def test_blocks_of_a_prefix_save_together_what_the_prefix_does(sizes: list[int]) -> None:
    """The worth of a prefix does not depend on how it is cut, and has no fixed cost in it."""
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    apart = sum(recompute_s(CURVE, s, n) for s, n in zip(starts, sizes, strict=True))
    assert apart == pytest.approx(CURVE.seconds(sum(sizes), 0) - CURVE.base_s)


def test_deeper_blocks_save_more() -> None:
    """Attention reads all that lies before."""
    saved = [recompute_s(CURVE, start, 32) for start in range(0, 4096, 32)]
    assert all(a < b for a, b in pairwise(saved))


few_keys = st.sampled_from([bytes([at]) for at in range(6)])


class Fading:
    """Ranks that fall at times known beforehand."""

    name = "fading"

    def seen(self, entry: Entry, now_s: float) -> None:
        pass

    def rank(self, entry: Entry, now_s: float) -> Rank:
        steps = int((now_s - entry.last_used_s) // entry.seconds_saved)
        until_s = entry.last_used_s + (steps + 1) * entry.seconds_saved
        return Rank(entry.n_bytes - steps, until_s)


class LeavesAgainstASort(RuleBasedStateMachine):
    """The lowest is what a scan over all would find, whatever came, went, was ranked anew or was
    spared; and no more is kept than that takes."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = Leaves(Fading())
        self.model: dict[bytes, Entry] = {}
        self.now_s = 0.0

    @rule(key=few_keys, worth=st.integers(1, 9), step_s=st.integers(1, 20))
    def offer(self, key: bytes, worth: int, step_s: int) -> None:
        self.model[key] = entry(
            key, last_used_s=self.now_s, n_bytes=worth, seconds_saved=float(step_s)
        )
        self.leaves.offer(self.model[key], self.now_s)

    @rule(key=few_keys)
    def withdraw(self, key: bytes) -> None:
        self.model.pop(key, None)
        self.leaves.withdraw(key)

    @rule(for_s=st.integers(1, 30))
    def wait(self, for_s: int) -> None:
        self.now_s += for_s

    @rule(key=few_keys)
    def spare(self, key: bytes) -> None:
        self.check({each: held for each, held in self.model.items() if each != key}, key)

    @invariant()
    def lowest(self) -> None:
        self.check(self.model, None)
        assert len(self.leaves) == len(self.model)
        assert len(self.leaves._order) <= 65 + 3 * len(self.model)
        assert len(self.leaves._ends) <= 65 + 3 * len(self.model)

    def check(self, among: dict[bytes, Entry], spared: bytes | None) -> None:
        found = self.leaves.lowest(self.now_s, spared)
        if not among:
            assert found is None
            return
        assert found is not None
        worths = [Fading().rank(held, self.now_s).worth for held in among.values()]
        assert found[1].worth == min(worths)
        assert found[0].key in among


TestLeavesAgainstASort = LeavesAgainstASort.TestCase
TestLeavesAgainstASort.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_eviction_looks_at_few_of_many() -> None:
    """Ten times as many blocks take no more ranks an operation: nothing is scanned."""

    class Counted(Lru):
        ranks = 0

        def rank(self, entry: Entry, now_s: float) -> Rank:
            self.ranks += 1
            return super().rank(entry, now_s)

    policy = Counted()
    leaves = Leaves(policy)
    for at in range(20_000):
        leaves.offer(entry(at.to_bytes(4, "big"), last_used_s=float(at)), float(at))
    policy.ranks = 0
    for at in range(20_000, 21_000):
        found = leaves.lowest(float(at))
        assert found is not None
        leaves.withdraw(found[0].key)
        leaves.offer(entry(at.to_bytes(4, "big"), last_used_s=float(at)), float(at))
    assert policy.ranks == 1_000


def test_value_density_weighs_cost_and_bytes() -> None:
    """Of two blocks as likely to be asked for, half the bytes or twice the cost count alike."""
    policy = ValueDensity()
    plain = policy.rank(entry(b"a"), 1.0).worth
    assert policy.rank(entry(b"a", seconds_saved=2.0), 1.0).worth == pytest.approx(2 * plain)
    assert policy.rank(entry(b"a", n_bytes=2), 1.0).worth == pytest.approx(plain / 2)


def test_nothing_seen_yet_is_least_recently_used() -> None:
    """Before it has learned anything, value density lets the older of two alike go first."""
    policy = ValueDensity()
    worths = [policy.rank(entry(b"a"), float(edge)).worth for edge in EDGES_S]
    assert all(a > b for a, b in pairwise(worths))


def keys() -> list[bytes]:
    random = np.random.default_rng(1)
    return [random.bytes(16) for _ in range(600)]


def test_a_rate_is_learned_from_what_was_used_and_what_was_not() -> None:
    """Blocks of one kind come back after 75 s, the others never: the first kind's rate is high
    until then and low afterwards, the other is low throughout."""
    history = ReuseHistory()
    again, never = kind_of(1, 0), kind_of(0, 1)
    now_s = 0.0
    for turn in range(40):
        for at, key in enumerate(keys()):
            if at % 2 == 0 or turn == 0:
                history.seen(key, again if at % 2 == 0 else never, now_s)
        now_s += 75.0
    young, _ = history.rate(again, 50.0)
    assert young > 1 / 40
    assert history.rate(again, 130.0)[0] < young / 5
    assert history.rate(never, 50.0)[0] < young / 3


def test_a_wait_before_the_reuse_is_no_reason_to_evict() -> None:
    """Right after its use a block is worth what waiting for the next one brings, though nobody
    asks at once."""
    history = ReuseHistory()
    for turn in range(40):
        for key in keys():
            history.seen(key, 0, turn * 75.0)
    assert history.rate(0, 0.0)[0] == pytest.approx(1 / 75, rel=0.25)


def test_an_old_habit_fades() -> None:
    """After some half-lives without reuse the rate is a small part of what it was."""
    history = ReuseHistory(half_life_s=300.0)
    for turn in range(40):
        for key in keys():
            history.seen(key, 0, turn * 75.0)
    before, _ = history.rate(0, 50.0)
    for turn in range(40, 80):
        for key in keys():
            history.seen(turn.to_bytes(1, "big") + key, 0, turn * 75.0)
    assert history.rate(0, 50.0)[0] < before / 4


def test_the_panel_is_bounded_and_still_learns() -> None:
    """Of many more keys than it may follow it keeps a sample, whichever they are."""
    history = ReuseHistory(panel_keys=100)
    for turn in range(60):
        for key in keys():
            history.seen(key, 0, turn * 75.0)
            assert len(history._panel) <= 100
    assert history.rate(0, 0.0)[0] > 1 / 150


def test_keys_that_begin_alike_do_not_overfill_the_panel() -> None:
    """It is thinned until one more fits, whatever the keys' bits."""
    history = ReuseHistory(panel_keys=4)
    for key in range(20):
        history.seen(bytes(7) + bytes([key]), 0, 0.0)
        assert len(history._panel) <= 4


def test_what_is_older_than_the_horizon_is_followed_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It counts as kept in vain, once."""
    monkeypatch.setattr(reuse, "REFRESH", 1)
    history = ReuseHistory()
    history.seen(bytes(16), 0, 0.0)
    history.seen(b"\1" * 16, 0, HORIZON_S + 1.0)
    assert list(history._panel) == [b"\1" * 16]
    assert history._exposed_s.sum() == pytest.approx(HORIZON_S)


@given(st.lists(st.floats(1e-9, 1.0), min_size=len(EDGES_S), max_size=len(EDGES_S)))
def test_an_index_is_between_the_hazards_to_come(hazards: list[float]) -> None:
    """At least the rate right now, at most the best one ahead; and with a falling hazard, now."""
    indices = reuse._index(hazards)
    for at, index in enumerate(indices):
        assert hazards[at] * (1 - 1e-6) <= index <= max(hazards[at:]) * (1 + 1e-6)
    falling = sorted(hazards, reverse=True)
    assert reuse._index(falling) == pytest.approx(falling, rel=1e-3)


@given(st.lists(st.sampled_from([1e-4, 1e-3, 0.03]), min_size=16, max_size=16))
@settings(max_examples=25)
def test_an_index_is_what_integrating_over_seconds_gives(hazards: list[float]) -> None:
    """The best, over all ends of bins, of the chance of a reuse by then over the time until it."""
    step_s = 0.25
    edges = [*EDGES_S, HORIZON_S]
    per_step = np.repeat(hazards, (np.diff(edges) / step_s).astype(int))
    indices = reuse._index(hazards)
    for at in (0, 3, 9):
        ahead = per_step[int(edges[at] / step_s) :]
        alive = np.exp(-np.cumsum(ahead) * step_s)
        stay_s = np.cumsum((alive + np.append(1.0, alive[:-1])) / 2) * step_s
        ends = [int((end - edges[at]) / step_s) - 1 for end in edges[at + 1 :]]
        best = max((1.0 - alive[end]) / stay_s[end] for end in ends)
        assert indices[at] == pytest.approx(best, rel=1e-3)


def test_kinds_are_few() -> None:
    """However often a block was used and however long its conversation is."""
    kinds = {kind_of(hits, turns) for hits in range(20) for turns in range(20)}
    assert kinds == set(range(KINDS))
    assert kind_of(CAP + 5, 0) == kind_of(CAP, 0)


def test_the_last_bin_never_ends() -> None:
    """Its rate is true for ever, so that old blocks are not ranked again and again."""
    assert ReuseHistory().rate(0, 1e9)[1] == inf


@pytest.mark.parametrize("wrong", [{"panel_keys": 0}, {"half_life_s": 0.0}])
def test_a_history_of_nothing_is_an_error(wrong: dict) -> None:
    """It says what to give."""
    with pytest.raises(VaultError, match="half-life"):
        ReuseHistory(**wrong)


@given(
    st.lists(st.tuples(st.integers(0, KINDS - 1), st.floats(0.0, 3 * HORIZON_S)), max_size=30),
)
def test_waiting_blocks_expose_each_bin_they_lived_through(held: list[tuple[int, float]]) -> None:
    """Counted all at once as one by one."""
    history = ReuseHistory()
    for at, (kind, age_s) in enumerate(sorted(held, key=lambda each: -each[1])):
        history.seen(at.to_bytes(16, "big"), kind, -age_s)
    expected = np.zeros((KINDS, len(EDGES_S)))
    for kind, age_s in held:
        for at, (lo, hi) in enumerate(pairwise([*EDGES_S, HORIZON_S])):
            expected[kind, at] += max(0.0, min(age_s, hi) - lo)
    assert history._waiting_s(0.0) == pytest.approx(expected)
