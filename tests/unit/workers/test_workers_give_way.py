"""Who gives way in an engine's next step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.give_way import Running, Scene, Way, Why, give_way

IDLE = Scene((), 0, 0, 0, 100, 8, 128)
STREAM = Running("stream", False, False, 1, 0.0, 10)
BATCH_STREAM = replace(STREAM, name="batch-stream", yields=True)
PROMPT = Running("prompt", False, True, 1000, 0.0, 30)
BATCH_PROMPT = replace(PROMPT, name="batch-prompt", yields=True)
HELD = ("batch-prompt",)


def scene(*running: Running, **fields: int) -> Scene:
    return replace(IDLE, running=running, **fields)


@pytest.mark.parametrize(
    ("case", "there", "way"),
    [
        ("nothing urgent", scene(BATCH_PROMPT, BATCH_STREAM), Way(128, (), Why.NOBODY)),
        ("an urgent stream only", scene(STREAM, BATCH_PROMPT), Way(128, (), Why.NOBODY)),
        ("a long urgent prompt", scene(PROMPT, BATCH_PROMPT), Way(128, (), Why.PROMPT, HELD)),
        (
            "the end of an urgent prompt, and streams of both classes",
            scene(replace(PROMPT, left_tokens=40), BATCH_PROMPT, STREAM, BATCH_STREAM),
            Way(42, (), Why.PROMPT, HELD),
        ),
        (
            "an urgent prompt waits",
            scene(BATCH_PROMPT, waiting=1, waiting_tokens=50),
            Way(50, (), Why.PROMPT, HELD),
        ),
        (
            "it waits for a seat",
            scene(STREAM, BATCH_STREAM, waiting=1, waiting_tokens=9, free_seats=0),
            Way(10, ("batch-stream",), Why.SEAT),
        ),
        (
            "it waits for pages",
            scene(BATCH_PROMPT, waiting=1, waiting_tokens=200, first_pages=20, free_pages=0),
            Way(128, ("batch-prompt",), Why.PAGES),
        ),
        (
            "all that could give way do not have enough",
            scene(BATCH_PROMPT, waiting=1, waiting_tokens=200, first_pages=31, free_pages=0),
            Way(128, (), Why.PROMPT, HELD),
        ),
        (
            "tiers are still asked for it, and nobody stands still meanwhile",
            scene(STREAM, BATCH_PROMPT, waiting=1),
            Way(128, (), Why.NOBODY),
        ),
        (
            "nobody could give way",
            scene(STREAM, waiting=1, waiting_tokens=9, free_seats=0),
            Way(10, (), Why.PROMPT),
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_urgent_requests_get_what_they_need(case: str, there: Scene, way: Way) -> None:
    """The table says what becomes of a step."""
    assert give_way(there) == way, case


def test_the_youngest_goes_first() -> None:
    """So that the oldest batch request ends, whatever comes."""
    batch = [replace(BATCH_STREAM, name=str(at), arrived_s=float(at), pages=5) for at in range(4)]
    there = scene(*batch, waiting=1, waiting_tokens=64, first_pages=12, free_pages=4)
    assert give_way(there).preempted == ("3", "2")


RUNNING = st.builds(
    Running,
    name=st.uuids().map(str),
    yields=st.booleans(),
    computes=st.booleans(),
    left_tokens=st.integers(1, 500),
    arrived_s=st.floats(0, 10),
    pages=st.integers(0, 40),
)
SCENES = st.builds(
    Scene,
    running=st.lists(RUNNING, max_size=8).map(tuple),
    waiting=st.integers(1, 3),
    waiting_tokens=st.integers(0, 500),
    first_pages=st.integers(0, 60),
    free_pages=st.integers(0, 60),
    free_seats=st.integers(0, 2),
    step_tokens=st.integers(1, 256),
)


@given(there=SCENES)
def test_no_urgent_request_is_worse_off(there: Scene) -> None:
    """None is preempted; the step has tokens for all of them, as far as a step goes; who is
    preempted frees what was lacked; and without anybody urgent nothing changes."""
    way = give_way(there)
    by_name = {each.name: each for each in there.running}
    assert all(by_name[name].yields for name in way.preempted)
    urgent = [each for each in there.running if not each.yields]
    needed = sum(each.left_tokens for each in urgent) + there.waiting_tokens
    assert min(needed, there.step_tokens) <= way.step_tokens <= there.step_tokens
    if way.preempted:
        freed = sum(by_name[name].pages for name in way.preempted)
        assert there.free_pages + freed >= there.first_pages
        assert there.free_seats + len(way.preempted) >= 1
    if not there.waiting_tokens and not any(each.computes for each in urgent):
        assert (way.step_tokens, way.held) == (there.step_tokens, ())


@given(there=SCENES)
def test_beside_an_urgent_prompt_no_yielding_one_is_computed(there: Scene) -> None:
    """What is left of the step once urgent requests have theirs is a token for each batch
    stream."""
    urgent = [each for each in there.running if not each.yields]
    if there.waiting_tokens or any(each.computes for each in urgent):
        way = give_way(there)
        computing = {each.name for each in there.running if each.yields and each.computes}
        assert computing == {*way.held, *computing.intersection(way.preempted)}
        needed = sum(e.left_tokens for e in urgent) + there.waiting_tokens
        streams = sum(e.left_tokens for e in there.running if e.yields and not e.computes)
        assert give_way(there).step_tokens <= max(1, needed + streams)
