import pickle
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.errors import PlanError
from kv.plan import Plan, Reason, Rival, Shape, Source, Span

HIT = Span(Source.HIT, 0, 96, "prefill-0")
COMPUTE = Span(Source.COMPUTE, 96, 1_024, "prefill-0")

CUTS = st.sets(st.integers(1, 100_000), min_size=1, max_size=6).map(lambda cuts: [0, *sorted(cuts)])
PART = re.compile(r"hit=0|(hit|fetch|compute)=[1-9][0-9]*@[!-~]+")


def plan_of(spans: tuple[Span, ...], predicted_ttft_s: float = 0.8124) -> Plan:
    rival = Rival(Shape.LOCAL, None, "decode-0", 2.0, 2.1)
    return Plan(
        Shape.REMOTE,
        Reason.CHEAPER_REMOTE,
        "prefill-0",
        "decode-0",
        spans,
        predicted_ttft_s,
        0.9,
        (rival,),
    )


def spans_of(cuts: list[int]) -> tuple[Span, ...]:
    sources = list(Source)
    return tuple(
        Span(
            source := sources[index % 3],
            start,
            end,
            f"replica-{index}",
            Tier.HOST if source is Source.FETCH else None,
        )
        for index, (start, end) in enumerate(pairwise(cuts))
    )


def test_the_header_shows_shape_spans_prediction_and_reason() -> None:
    """The form is that of DESIGN.md's x-breakeven-plan."""
    assert plan_of((HIT, COMPUTE)).header() == (
        "remote; hit=96@prefill-0 compute=928@prefill-0; "
        "predicted_ttft_ms=812; reason=cheaper_remote"
    )


def test_a_fetch_names_the_codec_that_may_have_stored_its_blocks() -> None:
    """A vault's alone: the other tiers hold pages as they are."""
    spans = (
        Span(Source.FETCH, 0, 64, "decode-0", Tier.HOST),
        Span(Source.FETCH, 64, 512, "decode-0", Tier.VAULT),
        Span(Source.COMPUTE, 512, 520, "decode-0"),
    )
    assert " fetch=64@decode-0/host fetch=448@decode-0/vault/int8 " in (
        plan_of(spans).coded("int8").header()
    )
    assert "int8" not in plan_of(spans).header()


def test_a_plan_without_a_hit_says_so() -> None:
    """A miss is shown as hit=0, not left to be guessed."""
    header = plan_of((Span(Source.COMPUTE, 0, 40, "decode-0"),), 0.0).header()
    assert header == (
        "remote; hit=0 compute=40@decode-0; predicted_ttft_ms=0; reason=cheaper_remote"
    )


def test_a_fetched_tail_is_shown_before_the_computed_head() -> None:
    """Spans are shown by source: hit, fetch, compute."""
    head = Span(Source.COMPUTE, 0, 64, "prefill-0")
    tail = Span(Source.FETCH, 64, 96, "decode-0", Tier.DISK)
    assert "; hit=0 fetch=32@decode-0/disk compute=64@prefill-0; " in plan_of((head, tail)).header()


@given(CUTS, st.floats(0, 1e6))
def test_a_header_is_one_line_of_visible_ascii(cuts: list[int], predicted_ttft_s: float) -> None:
    """Each span has its part, and the tokens of all parts sum to the prompt."""
    header = plan_of(spans_of(cuts), predicted_ttft_s).header()
    assert re.fullmatch(r"[ -~]+", header)
    shape, spans, ttft, reason = header.split("; ")
    assert (shape, reason) == ("remote", "reason=cheaper_remote")
    assert re.fullmatch(r"predicted_ttft_ms=[0-9]+", ttft)
    assert all(PART.fullmatch(part) for part in spans.split(" "))
    assert sum(map(int, re.findall(r"=(\d+)", spans))) == cuts[-1]


@given(CUTS, st.data())
def test_spans_tile_the_prompt(cuts: list[int], data: st.DataObject) -> None:
    """Spans in order are a plan; with one shifted at its start, they have a gap or an overlap."""
    spans = list(spans_of(cuts))
    assert plan_of(tuple(spans)).spans == tuple(spans)
    index = data.draw(st.integers(0, len(spans) - 1))
    span = spans[index]
    starts = st.integers(0, span.end_token - 1).filter(lambda start: start != span.start_token)
    if span.end_token > 1:
        spans[index] = replace(span, start_token=data.draw(starts))
        with pytest.raises(PlanError, match="a span starts at token"):
            plan_of(tuple(spans))


def test_spans_out_of_order_are_refused() -> None:
    """The message names the two tokens that do not meet."""
    with pytest.raises(PlanError, match="a span starts at token 96, 0 are covered"):
        plan_of((COMPUTE, HIT))


def test_a_plan_has_spans() -> None:
    """A plan for no tokens is refused."""
    with pytest.raises(PlanError, match="0 spans"):
        plan_of(())


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (-1, 5)])
def test_a_span_has_tokens(start: int, end: int) -> None:
    """An empty or negative span is refused where it is made."""
    with pytest.raises(PlanError, match=re.escape(f"tokens [{start}, {end})")):
        Span(Source.HIT, start, end, "decode-0")


@pytest.mark.parametrize(
    "name", ["", "decode 0", "d;0", "d=0", "d@0", "décode", "d\r\nx: y", "d\n"]
)
def test_a_replica_name_cannot_break_a_header(name: str) -> None:
    """Names are visible ASCII without the header's own separators."""
    with pytest.raises(PlanError, match="replica name"):
        Span(Source.HIT, 0, 5, name)


@pytest.mark.parametrize("name", ["decode-0", "ns/pod.3:8000", "a_b~!", "<?>"])
def test_a_usual_replica_name_is_kept(name: str) -> None:
    """Pod names, addresses and the like need no escaping."""
    assert Span(Source.HIT, 0, 5, name).replica == name


@pytest.mark.parametrize(
    ("source", "tier"), [(Source.FETCH, None), (Source.HIT, Tier.HOST), (Source.COMPUTE, Tier.DISK)]
)
def test_a_fetch_has_a_tier_and_nothing_else_has(source: Source, tier: Tier | None) -> None:
    """The engine must be told where from; hits are of the device."""
    with pytest.raises(PlanError, match="its tier is"):
        Span(source, 0, 5, "decode-0", tier)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_prediction_is_a_time(bad: float) -> None:
    """A prediction that is negative or not finite is refused, with the number."""
    with pytest.raises(PlanError, match=f"predicted TTFT {bad} s"):
        plan_of((HIT, COMPUTE), bad)


def test_a_plan_survives_pickling() -> None:
    """Plans travel between processes."""
    plan = plan_of((HIT, COMPUTE))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_words_on_the_wire_are_stable() -> None:
    """Headers, metrics and the audit show these words; dashboards match on them."""
    assert list(map(str, Shape)) == ["local", "remote", "fetch", "fetch-remote", "split"]
    assert list(map(str, Source)) == ["hit", "fetch", "compute"]
    assert set(map(str, Reason)) == {
        "only_replica",
        "cheaper_local",
        "cheaper_remote",
        "cheaper_fetch",
        "overlap",
        "no_prefill_replica",
        "no_catalogue",
        "session",
        "kept",
        "exact_names",
        "explored",
        "prompt_logprobs",
        "least_loaded",
        "prefix_affinity",
        "round_robin",
        "threshold",
        "always_fetch",
        "always_compute",
        "prefill_lost",
        "decode_lost",
    }
