"""What the eviction benchmark makes of a trace."""

import gzip
import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tiers import eviction
from benchmarks.tiers.eviction import CURVES, Request, load, replay, saved_s
from benchmarks.tiers.offline import upper_bound
from kv.eviction import Lru, ValueDensity

# Prompts are paths in a small tree.
some_requests = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
        lambda path: tuple(bytes(path[: at + 1]) + bytes(16) for at in range(len(path)))
    ),
    min_size=1,
    max_size=9,
)
SECONDS = [1.0, 2.0, 4.0, 9.0]


def best(requests: list[tuple[bytes, ...]], places: int) -> float:
    """The most that any choice of what to keep saves, without the order of a prefix: by trying
    all choices of intervals."""
    last: dict[bytes, int] = {}
    intervals = []
    for at, keys in enumerate(requests):
        for depth, key in enumerate(keys):
            if key in last:
                intervals.append((last[key], at, SECONDS[depth]))
            last[key] = at
    most = 0.0
    for taken in product((False, True), repeat=len(intervals)):
        chosen = [each for each, take in zip(intervals, taken, strict=True) if take]
        held = [sum(start <= at < end for start, end, _ in chosen) for at in range(len(requests))]
        if max(held, default=0) <= places:
            most = max(most, sum(worth for *_, worth in chosen))
    return most


@given(some_requests, st.integers(1, 5))
@settings(max_examples=40)
def test_no_policy_beats_the_bound(requests: list[tuple[bytes, ...]], places: int) -> None:
    """Neither of ours does, on any trace."""
    bound = upper_bound(requests, SECONDS, places)
    timed = [Request(float(at), keys) for at, keys in enumerate(requests)]
    for policy in (Lru(), ValueDensity()):
        found = replay(timed, policy, places, SECONDS)
        assert saved_s(found, SECONDS) <= bound + 1e-9


@given(some_requests.map(lambda requests: requests[:5]), st.integers(1, 3))
@settings(max_examples=25)
def test_the_bound_holds_for_the_best_choice_and_is_near_it(
    requests: list[tuple[bytes, ...]], places: int
) -> None:
    """It is above what trying everything finds, by little."""
    while sum(map(len, requests)) > 14:
        requests = requests[:-1]
    most = best(requests, places)
    bound = upper_bound(requests, SECONDS, places)
    assert most - 1e-9 <= bound <= most * 1.1 + 1e-9


def test_a_store_that_never_fills_finds_all_that_came_before() -> None:
    """Whatever the policy."""
    prompts = [(b"a" * 16, b"b" * 16), (b"a" * 16, b"c" * 16), (b"a" * 16, b"b" * 16)]
    timed = [Request(float(at), keys) for at, keys in enumerate(prompts)]
    for policy in (Lru(), ValueDensity()):
        assert replay(timed, policy, 9, SECONDS) == [0, 1, 2]


def test_the_rows_say_what_was_found_and_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that no policy can reach is a miss that says so."""
    trace = tmp_path / "trace.jsonl.gz"
    with gzip.open(trace, "wt") as lines:
        for at in range(40):
            ids = [at % 4 * 10 + depth for depth in range(3)]
            lines.write(json.dumps({"timestamp": at * 1000, "hash_ids": ids}) + "\n")
    assert len(load(trace)) == 40
    rows, series = eviction.replayed(trace, (100,))
    against = [row for row in rows if row.name.startswith("eviction against LRU")]
    assert len(against) == len(CURVES)
    for row in against:
        assert (row.value, row.ok) == (1.0, False)
        assert "no policy can reach" in row.detail
    for points in series.values():
        assert points[100] == {"lru": 1.0, "value": 1.0, "bound": pytest.approx(1.0)}
    eviction.write(rows, series, tmp_path / "eviction.json")
    assert len(json.loads((tmp_path / "eviction.json").read_text())["rows"]) == len(rows)
