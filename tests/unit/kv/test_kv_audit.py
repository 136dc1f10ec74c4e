"""The audit's lines: what was written is read, and what is none is told."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.audit import MAX_LINE_BYTES, NAME_BYTES, Asked, BadLine, Entry, Planned, encode, read
from kv.catalogue import Tier
from kv.parts import Action, Part
from kv.plan import Hints, Plan, Reason, Rival, Shape, Source, Span

# A line of version 1 as it was first written. It must be read for as long as version 1 is.
FIRST = Path(__file__).with_name("audit-v1.jsonl")

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)
replicas = st.sampled_from(["prefill-0", "decode-0", "decode-1"])
seconds = st.floats(0.0, 1e6)
counts = st.integers(0, 2**40)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that can be made."""
    lengths = draw(st.lists(st.integers(1, 4096), min_size=1, max_size=4))
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    spans = []
    for start, end in zip([0, *ends], ends, strict=False):
        source = draw(st.sampled_from(Source))
        tier = draw(st.sampled_from(Tier)) if source is Source.FETCH else None
        spans.append(Span(source, start, end, draw(replicas), tier))
    return Plan(
        shape=draw(st.sampled_from(Shape)),
        reason=draw(st.sampled_from(Reason)),
        prefill=draw(st.none() | replicas),
        decode=draw(replicas),
        spans=tuple(spans),
        predicted_ttft_s=draw(seconds),
        cost_s=draw(seconds),
        rivals=tuple(draw(st.lists(rivals, max_size=3))),
        hints=draw(hints),
        parts=tuple(draw(st.lists(parts, max_size=5))),
    )


rivals = st.builds(Rival, st.sampled_from(Shape), st.none() | replicas, replicas, seconds, seconds)
hints = st.builds(
    Hints,
    st.none() | counts,
    st.lists(st.sampled_from(Tier), max_size=3).map(tuple),
    st.none() | seconds,
    st.none() | names,
)
parts = st.builds(Part, st.sampled_from(Action), replicas, seconds, seconds)
by_source = st.dictionaries(
    st.sampled_from(["prefill", "decode"]), st.dictionaries(names, counts, max_size=3)
)
asked = st.builds(
    Asked,
    prompt_tokens=counts,
    block_tokens=counts,
    blocks=st.binary(max_size=4).map(lambda some: some * NAME_BYTES),
    max_tokens=st.none() | counts,
    timeout_s=st.none() | seconds,
    local_only=st.booleans(),
    codec=st.none() | names,
    retention_s=st.none() | seconds,
)
entries = st.builds(
    Entry,
    capture=names,
    request_id=names,
    at_s=st.floats(0.0, 4e9),
    model=st.text(max_size=9),
    tenant=names,
    session=st.none() | names,
    service_class=names,
    asked=asked,
    plans=st.lists(st.builds(Planned, seconds, plans()), min_size=1, max_size=3).map(tuple),
    outcome=names,
    ttft_s=st.none() | seconds,
    itl_mean_s=st.none() | seconds,
    itl_max_s=st.none() | seconds,
    total_s=st.none() | seconds,
    answer_tokens=counts,
    sources=by_source,
    moved_bytes=by_source,
    engine_s=st.none() | seconds,
    parts=st.lists(parts, max_size=5).map(tuple),
    waited_s=seconds,
)


def all_of(lines: Iterable[bytes]) -> tuple[list[Entry], list[BadLine]]:
    bad: list[BadLine] = []
    return list(read(lines, bad.append)), bad


@given(st.lists(entries, max_size=5))
def test_what_is_written_is_read(written: list[Entry]) -> None:
    """Every field of every entry, to the last bit of its floats, one line each."""
    lines = [encode(entry) for entry in written]
    assert all(line.count(b"\n") == 1 for line in lines)
    assert all_of(b"".join(lines).splitlines(keepends=True)) == (written, [])


@given(entries, st.binary(max_size=200))
def test_a_bad_line_costs_itself_alone(entry: Entry, garbage: bytes) -> None:
    """Whatever stands between two entries, both are read, and nothing is raised."""
    line = garbage.replace(b"\n", b"") + b"\n"
    read_, bad = all_of([encode(entry), line, encode(entry)])
    assert read_ == [entry, entry]
    assert [each.number for each in bad] == ([2] if line.strip() else [])


@given(entries, st.data())
def test_a_torn_line_is_told_with_its_number(entry: Entry, data: st.DataObject) -> None:
    """A crash in mid-line leaves a beginning, which is never taken for an entry."""
    line = encode(entry)
    torn = line[: data.draw(st.integers(1, len(line) - 2))]
    read_, [bad] = all_of([torn + b"\n", encode(entry)])
    assert (read_, bad.number) == ([entry], 1)


def first() -> Entry:
    """The entry that is kept in a file."""
    (entry,), bad = all_of(FIRST.read_bytes().splitlines(keepends=True))
    assert bad == []
    return entry


def within(least: object, other: object) -> bool:
    """Whether `other` says all that `least` does, in the same places."""
    if isinstance(least, dict) and isinstance(other, dict):
        return all(key in other and within(least[key], other[key]) for key in least)
    if isinstance(least, list) and isinstance(other, list):
        return len(least) == len(other) and all(map(within, least, other))
    return least == other


def test_the_first_line_of_version_1_is_read_and_written_alike() -> None:
    """Renaming a field, of a plan or of its spans too, makes what people have kept unreadable."""
    entry = first()
    assert within(json.loads(FIRST.read_bytes()), json.loads(encode(entry)))
    assert entry.plan.spans[1].tier is Tier.HOST
    assert [name.hex() for name in entry.asked.names()] == ["00" * 8, "ff" * 8]
    assert entry.service_class == "interactive"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v": 2}, "version 2, 1 is known here"),
        ({"v": "1"}, "`$.v`"),
        ({"v": None}, "`$.v`"),
        ({"plans": []}, "`$.plans`"),
        ({"answer_tokens": -1}, "`$.answer_tokens`"),
        ({"ttft_s": -0.5}, "`$.ttft_s`"),
        ({"at_s": "now"}, "`$.at_s`"),
        ({"asked": {"prompt_tokens": 1, "blocks": "AAAA"}}, "3 bytes, 8 a block wanted"),
        ({"asked": {"prompt_tokens": 1, "blocks": "!"}}, "base64"),
        ({"asked": {}}, "prompt_tokens"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(change: dict[str, object], says: str) -> None:
    """The field, or the version, in words."""
    line = json.dumps({**json.loads(FIRST.read_bytes()), **change}).encode()
    read_, bad = all_of([line])
    assert read_ == []
    assert [each.number for each in bad] == [1]
    assert says in bad[0].complaint


def test_a_plan_that_contradicts_itself_is_a_bad_line() -> None:
    """Spans with a gap are refused by the plan itself."""
    line = FIRST.read_bytes().replace(b'"start_token":64', b'"start_token":65', 1)
    _, [bad] = all_of([line])
    assert "in prompt order without gaps" in bad.complaint


def test_nesting_and_length_are_bounded() -> None:
    """Lines that would exhaust the stack or the memory are bad lines as others are."""
    deep = b'{"v":1,"x":' + b"[" * 100_000
    long = b'{"v":1,"x":"' + b"x" * MAX_LINE_BYTES + b'"}'
    _, bad = all_of([deep, long])
    assert [each.complaint for each in bad] == [
        "nested too deeply",
        f"more than {MAX_LINE_BYTES} bytes",
    ]


def test_fields_of_later_writers_are_read_past() -> None:
    """What version 1 gains later does not keep an older reader from the rest."""
    line = FIRST.read_bytes().replace(b'"v":1', b'"v":1,"gained":{"later":[1]}')
    assert all_of([line]) == ([first()], [])


def test_an_error_ratio_wants_one_plan_and_a_first_token() -> None:
    """Actual over predicted; a failure that no curve predicts is no error of a curve, and neither
    is how long a batch request gave way to others."""
    entry = first()
    assert entry.error_ratio == pytest.approx(entry.ttft_s / entry.plan.predicted_ttft_s)
    for change in (
        {"ttft_s": None},
        {"service_class": "batch"},
        {"plans": (*entry.plans, *entry.plans)},
        {"plans": (Planned(0.0, replace(entry.plan, predicted_ttft_s=0.0)),)},
    ):
        assert msgspec.structs.replace(entry, **change).error_ratio is None
