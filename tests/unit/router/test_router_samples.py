"""What seconds of one request say of a curve."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.curve import LinkCurve, PrefillCurve, PrefillSample, TransferSample
from kv.plan import Plan, Reason, Shape, Source, Span
from router.samples import handoff_of, link_sample, prefill_sample
from workers.messages import Sources, Spent

PROMPT = Sources(1000, 600, 400, 0)
LINK = LinkCurve(0.01, 1e-8)
COMPUTING = PrefillCurve(0.02, 0.002, 0.0)
BYTES = 10_000_000  # 0.11 s by that link


def test_a_prompt_alone_is_what_it_took() -> None:
    """Neither waiting nor loading is computing."""
    spent = Spent(5.0, 0.0, 1.2)
    assert prefill_sample(PROMPT, spent) == PrefillSample(600, 400, 1.2)
    loaded = Spent(5.0, 3.0, 1.2, loaded_bytes=99)
    tiers = Sources(1000, 600, 0, 0, host_tokens=400)
    assert prefill_sample(tiers, loaded) == PrefillSample(600, 400, 1.2)


def test_prompts_computed_together_share_their_time() -> None:
    """By tokens, as long as most were its own."""
    sample = prefill_sample(PROMPT, Spent(0.0, 0.0, 1.2, others_tokens=200))
    assert sample is not None
    assert astuple(sample) == pytest.approx((600, 400, 0.9))
    assert prefill_sample(PROMPT, Spent(0.0, 0.0, 9.0, others_tokens=601)) is None


@pytest.mark.parametrize(
    ("sources", "spent"),
    [
        (Sources(1000, 0, 0, 1000), Spent(0.0, 0.1, 0.02, 99)),
        (PROMPT, Spent(0.0, 0.0, 0.0)),
        (PROMPT, Spent(0.0, 1.0, 1.2, loaded_bytes=99, others_tokens=1)),
    ],
    ids=["a handoff", "no time", "others while it loaded"],
)
def test_what_says_nothing_of_computing(sources: Sources, spent: Spent) -> None:
    """Nothing computed, nothing measured, or nobody knows for whom."""
    assert prefill_sample(sources, spent) is None


def test_a_handoff_is_loading_and_the_first_step() -> None:
    """What it waited for on its replica before is no cost of the link."""
    spent = Spent(5.0, 0.3, 0.02, BYTES)
    assert link_sample(spent, LINK) == TransferSample(BYTES, 0.3 + 0.02)


def test_what_moved_nothing_says_nothing_of_a_link() -> None:
    """The decode replica had it all."""
    assert link_sample(Spent(0.0, 0.0, 0.02), LINK) is None


def test_a_handoff_beside_another_prompt() -> None:
    """It may have been held up by that for half a second, or not: what is worse than both is the
    link's, and so is what is better; between them nobody knows."""

    def seen(loading_s: float) -> TransferSample | None:
        return link_sample(Spent(0.0, loading_s, 0.0, BYTES, 240), LINK, COMPUTING)

    assert seen(0.3) is None
    assert seen(5.0) == TransferSample(BYTES, 5.0 - COMPUTING.seconds(240, 0))
    assert seen(0.05) == TransferSample(BYTES, 0.05)
    assert link_sample(Spent(0.0, 5.0, 0.0, BYTES, 240), LINK) is None


@given(
    st.integers(1, 10_000),
    st.integers(0, 10_000),
    st.floats(1e-3, 100.0),
    st.integers(0, 10_000),
)
def test_a_sample_never_takes_longer_than_the_request(
    own: int, cached: int, seconds: float, others: int
) -> None:
    """Nor less than half as long, where it says anything of computing."""
    sample = prefill_sample(
        Sources(own + cached, own, cached, 0), Spent(0.0, 0.0, seconds, others_tokens=others)
    )
    if sample is not None:
        assert 0.49 * seconds <= sample.seconds <= seconds
        assert (sample.new_tokens, sample.cached_tokens) == (own, cached)
    else:
        assert others > own


@pytest.mark.parametrize(
    ("shape", "prefill", "pair"),
    [
        (Shape.LOCAL, None, None),
        (Shape.REMOTE, "p", ("p", "d")),
        (Shape.FETCH_REMOTE, "p", ("p", "d")),
        (Shape.SPLIT, "p", None),
    ],
)
def test_a_split_says_nothing_of_a_link(
    shape: Shape, prefill: str | None, pair: tuple[str, str] | None
) -> None:
    """Its decode replica waited for a tier as well, so its seconds are no handoff's."""
    spans = (Span(Source.COMPUTE, 0, 100, prefill or "d"),)
    plan = Plan(shape, Reason.OVERLAP, prefill, "d", spans, 1.0, 1.0, ())
    assert handoff_of(plan) == pair
