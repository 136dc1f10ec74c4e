from dataclasses import astuple
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from kv.crossover import crossover_tokens
from kv.curve import LinkCurve, PrefillCurve

NEAR = Fraction(1, 10**6)


def costs(largest: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(largest * 1e-3, largest)


@given(
    st.builds(PrefillCurve, costs(0.5), costs(1e-3), costs(1e-8)),
    st.builds(LinkCurve, costs(0.5), costs(1e-7)),
    st.sampled_from([1, 4_096, 46_080]),
)
def test_fetching_costs_no_more_from_there_on_and_more_just_before(
    computing: PrefillCurve, fetching: LinkCurve, token_bytes: int
) -> None:
    """By the curves themselves, in exact numbers, up to what floats cannot tell apart; and where
    there is no such length, fetching costs more however long the prefix is."""
    base_s, per_token_s, per_token2_s = map(Fraction, astuple(computing))
    latency_s, per_byte_s = map(Fraction, astuple(fetching))

    def both_s(n: Fraction) -> tuple[Fraction, Fraction]:
        return (
            base_s + per_token_s * n + per_token2_s * n * n,
            latency_s + per_byte_s * token_bytes * n,
        )

    found = crossover_tokens(computing, fetching, token_bytes)
    if found is None:
        computed_s, fetched_s = both_s(Fraction(10) ** 40)
        assert computed_s < fetched_s
        return
    for beyond in (0, 1, 1000, 10**9):
        computed_s, fetched_s = both_s(Fraction(found) + beyond)
        assert fetched_s <= computed_s + NEAR * (computed_s + fetched_s)
    if found > 0.0:
        computed_s, fetched_s = both_s(Fraction(found) * Fraction(9, 10))
        assert fetched_s >= computed_s - NEAR * (computed_s + fetched_s)


def test_figures_of_a_small_model_on_one_core() -> None:
    """460 tokens a second against 100 MB/s behind 50 ms: 29 tokens; against 10 MB/s, never, since
    a token is computed sooner than it is moved."""
    computing = PrefillCurve(0.0, 1 / 460, 0.0)
    found = crossover_tokens(computing, LinkCurve(0.05, 1e-8), 46_080)
    assert found is not None
    assert 28.0 < found < 30.0
    assert crossover_tokens(computing, LinkCurve(0.05, 1e-7), 46_080) is None


def test_a_link_that_costs_less_throughout_is_always_taken() -> None:
    """From the first token on, bent or not."""
    for bend in (0.0, 1e-8):
        computing = PrefillCurve(0.1, 1e-3, bend)
        assert crossover_tokens(computing, LinkCurve(0.01, 1e-9), 1000) == 0.0
