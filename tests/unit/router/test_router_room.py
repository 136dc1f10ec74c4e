"""When a batch request is begun."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.room import MOST_KV, PROMPTS_EACH, Crowd, Turn, Why, decide
from router.settings import BatchBounds

BOUNDS = BatchBounds(max_age_s=60.0, seats=0.5)
EMPTY = Crowd(computing=2, urgent_prompts=0, batch_prompts=0, streams=0, seats=32, kv_usage=0.0)


@pytest.mark.parametrize(
    ("case", "crowd", "waited_s", "turn"),
    [
        ("idle", EMPTY, 0.0, Turn(True, Why.ROOM)),
        (
            "one of two replicas is free",
            replace(EMPTY, urgent_prompts=1),
            0.0,
            Turn(True, Why.ROOM),
        ),
        ("none is free", replace(EMPTY, urgent_prompts=2), 0.0, Turn(False, Why.PROMPTS)),
        ("but it is old", replace(EMPTY, urgent_prompts=9), 60.0, Turn(True, Why.AGE)),
        (
            "others are as old",
            replace(EMPTY, urgent_prompts=9, old_prompts=2),
            90.0,
            Turn(False, Why.BATCH_PROMPTS),
        ),
        (
            "others are as old, and nobody else is there",
            replace(EMPTY, batch_prompts=2, old_prompts=2),
            90.0,
            Turn(False, Why.BATCH_PROMPTS),
        ),
        ("batch prompts", replace(EMPTY, batch_prompts=4), 0.0, Turn(False, Why.BATCH_PROMPTS)),
        ("half of the seats", replace(EMPTY, streams=16), 0.0, Turn(False, Why.SEATS)),
        ("one less", replace(EMPTY, streams=15), 0.0, Turn(True, Why.ROOM)),
        ("full pages", replace(EMPTY, streams=1, kv_usage=0.95), 0.0, Turn(False, Why.KV)),
        ("their share of KV", replace(EMPTY, batch_kv=0.2, next_kv=0.1), 0.0, Turn(False, Why.KV)),
        ("within it", replace(EMPTY, batch_kv=0.2, next_kv=0.05), 0.0, Turn(True, Why.ROOM)),
        ("a huge one alone", replace(EMPTY, next_kv=0.8), 0.0, Turn(True, Why.ROOM)),
        ("nobody is up", replace(EMPTY, computing=0, seats=0), 0.0, Turn(True, Why.NOBODY)),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_the_next_batch_request(case: str, crowd: Crowd, waited_s: float, turn: Turn) -> None:
    """The table says what becomes of it."""
    assert decide(crowd, waited_s, BOUNDS) == turn, case


CROWDS = st.builds(
    Crowd,
    computing=st.integers(0, 8),
    urgent_prompts=st.integers(0, 20),
    batch_prompts=st.integers(0, 20),
    streams=st.integers(0, 300),
    seats=st.integers(0, 256),
    kv_usage=st.floats(0, 1),
    batch_kv=st.floats(0, 1),
    next_kv=st.floats(0, 2),
    old_prompts=st.integers(0, 10),
)
LIMITS = st.builds(
    BatchBounds, max_age_s=st.floats(0.1, 1000), seats=st.floats(0.01, 1, exclude_min=True)
)


@given(crowd=CROWDS, bounds=LIMITS, waited_s=st.floats(0, 2000))
def test_nobody_waits_longer_than_the_age(
    crowd: Crowd, bounds: BatchBounds, waited_s: float
) -> None:
    """Whatever the load; but of those that are as old each replica computes one at a time."""
    turn = decide(crowd, waited_s, bounds)
    its_turn = waited_s >= bounds.max_age_s and crowd.old_prompts < crowd.computing
    assert turn.begun or not its_turn
    assert (turn.why is Why.AGE) == its_turn
    if waited_s >= bounds.max_age_s and crowd.computing:
        assert turn.begun == its_turn


@given(crowd=CROWDS, bounds=LIMITS, more=CROWDS)
def test_more_load_never_lets_one_in(crowd: Crowd, bounds: BatchBounds, more: Crowd) -> None:
    """A request that waits goes on waiting while load is added and no replica comes."""
    heavier = replace(
        crowd,
        urgent_prompts=crowd.urgent_prompts + more.urgent_prompts,
        batch_prompts=crowd.batch_prompts + more.batch_prompts,
        streams=crowd.streams + more.streams,
        kv_usage=max(crowd.kv_usage, more.kv_usage),
        batch_kv=crowd.batch_kv + more.batch_kv,
    )
    assert decide(crowd, 0.0, bounds).begun or not decide(heavier, 0.0, bounds).begun


@given(crowd=CROWDS, bounds=LIMITS)
def test_room_is_a_replica_s_time(crowd: Crowd, bounds: BatchBounds) -> None:
    """One that is begun for room finds a replica that no urgent prompt keeps busy, and begins no
    more prompts than those replicas take."""
    if decide(crowd, 0.0, bounds).why is Why.ROOM:
        assert crowd.urgent_prompts < crowd.computing
        assert crowd.batch_prompts < PROMPTS_EACH * crowd.computing
        assert not crowd.streams or crowd.kv_usage <= MOST_KV


@given(
    computing=st.integers(1, 8), bounds=LIMITS, seats=st.integers(1, 64), next_kv=st.floats(0, 2)
)
def test_idle_engines_begin_it_at_once(
    computing: int, bounds: BatchBounds, seats: int, next_kv: float
) -> None:
    """However small the shares of seats and pages."""
    empty = Crowd(computing, 0, 0, 0, seats, 0.0, 0.0, next_kv)
    assert decide(empty, 0.0, bounds) == Turn(True, Why.ROOM)
