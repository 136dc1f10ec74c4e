import random
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.curve import (
    LinkCurve,
    PrefillCurve,
    PrefillSample,
    TransferSample,
    fit_link,
    fit_prefill,
)
from kv.errors import CurveError

TOKENS = st.integers(0, 200_000)
SECONDS = st.floats(1e-6, 1e4)


def costs(largest: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(largest * 1e-4, largest)


PREFILL_CURVES = st.builds(PrefillCurve, costs(1.0), costs(1e-2), costs(1e-6))
LINK_CURVES = st.builds(LinkCurve, costs(1.0), costs(1e-7))
PREFILL_SAMPLES = st.lists(
    st.builds(PrefillSample, st.integers(1, 200_000), TOKENS, SECONDS), min_size=1, max_size=12
)
TRANSFER_SAMPLES = st.lists(
    st.builds(TransferSample, st.integers(0, 2**40), SECONDS), min_size=1, max_size=12
)
GRID = [(new, cached) for new in (32, 512, 2_048, 8_192) for cached in (0, 1_024, 8_192)]


def test_prefill_costs_more_behind_more_cached_tokens() -> None:
    """Seconds are base + a*(n - h) + b*(n^2 - h^2)."""
    curve = PrefillCurve(0.5, 0.01, 0.0001)
    assert curve.seconds(10, 0) == pytest.approx(0.5 + 0.1 + 0.01)
    assert curve.seconds(10, 90) == pytest.approx(0.5 + 0.1 + 0.0001 * (100**2 - 90**2))


def test_nothing_still_costs_the_fixed_part() -> None:
    """No new tokens cost the base, no bytes the latency."""
    assert PrefillCurve(0.5, 0.01, 0.0001).seconds(0, 4_096) == 0.5
    assert LinkCurve(0.002, 1e-9).seconds(0) == 0.002


@given(PREFILL_CURVES.filter(lambda curve: curve.seconds(32, 0) > 0.0))
def test_fit_recovers_a_prefill_curve_from_exact_samples(curve: PrefillCurve) -> None:
    """Samples on a curve give the costs of that curve, between the samples and past them."""
    fitted = fit_prefill([PrefillSample(*point, curve.seconds(*point)) for point in GRID])
    for point in [*GRID, (100, 100), (32_768, 0)]:
        assert fitted.seconds(*point) == pytest.approx(curve.seconds(*point), rel=1e-3)


@given(LINK_CURVES.filter(lambda curve: curve.seconds(1) > 0.0))
def test_fit_recovers_a_link_curve_from_exact_samples(curve: LinkCurve) -> None:
    """Samples on a curve give the costs of that curve."""
    sizes = [2**power for power in range(0, 31, 3)]
    fitted = fit_link([TransferSample(size, curve.seconds(size)) for size in sizes])
    for size in [*sizes, 2**32]:
        assert fitted.seconds(size) == pytest.approx(curve.seconds(size), rel=1e-3)


@given(PREFILL_SAMPLES, TOKENS, TOKENS, TOKENS, TOKENS)
def test_fitted_prefill_never_pays_and_never_falls(
    samples: list[PrefillSample], new: int, cached: int, more_new: int, more_cached: int
) -> None:
    """Whatever was measured, cost is at least 0, and more tokens never cost less."""
    curve = fit_prefill(samples)
    assert 0.0 <= curve.seconds(new, cached) <= curve.seconds(new + more_new, cached + more_cached)


@given(TRANSFER_SAMPLES, st.integers(0, 2**40), st.integers(0, 2**40))
def test_fitted_link_never_pays_and_never_falls(
    samples: list[TransferSample], n_bytes: int, more_bytes: int
) -> None:
    """Whatever was measured, cost is at least 0, and more bytes never cost less."""
    curve = fit_link(samples)
    assert 0.0 <= curve.seconds(n_bytes) <= curve.seconds(n_bytes + more_bytes)


def test_fit_weighs_relative_errors() -> None:
    """A second off at 60 s does not drown the samples of 20 ms."""
    exact = [PrefillSample(new, 0, 0.01 + 1e-3 * new) for new in (10, 20, 40, 80)]
    fitted = fit_prefill([*exact, PrefillSample(60_000, 0, 61.0)])
    assert fitted.seconds(10, 0) == pytest.approx(0.02, rel=0.05)


def test_fit_bears_noise() -> None:
    """With 5% of noise on 60 samples the costs of the true curve come back within 5%."""
    rng = random.Random(7)
    curve = PrefillCurve(0.1, 0.002, 2e-7)
    samples = [
        PrefillSample(*point, curve.seconds(*point) * rng.uniform(0.95, 1.05)) for point in GRID * 5
    ]
    fitted = fit_prefill(samples)
    for point in GRID:
        assert fitted.seconds(*point) == pytest.approx(curve.seconds(*point), rel=0.05)


def test_one_sample_gives_a_rate() -> None:
    """One measurement tells nothing of a fixed cost."""
    prefill = fit_prefill([PrefillSample(1_000, 0, 2.0)])
    assert astuple(prefill) == pytest.approx((0.0, 0.002, 0.0), rel=1e-9, abs=0.0)
    link = fit_link([TransferSample(1_000, 2.0)])
    assert astuple(link) == pytest.approx((0.0, 0.002), rel=1e-9, abs=0.0)


def test_two_samples_give_a_rate_and_a_fixed_cost() -> None:
    """Two measurements are met by the line through them."""
    curve = fit_prefill([PrefillSample(1_000, 0, 2.0), PrefillSample(2_000, 0, 3.0)])
    assert astuple(curve) == pytest.approx((1.0, 0.001, 0.0), rel=1e-9, abs=0.0)


def test_two_samples_that_bend_upward_give_a_square_cost() -> None:
    """Where the line would start below zero the bend is attention's."""
    curve = fit_prefill([PrefillSample(1_000, 0, 2.0), PrefillSample(2_000, 0, 6.0)])
    assert astuple(curve) == pytest.approx((0.0, 0.001, 1e-6), rel=1e-9, abs=0.0)


def test_samples_of_one_length_give_the_middle_rate() -> None:
    """Collinear samples still give a curve through their middle."""
    curve = fit_prefill([PrefillSample(1_000, 0, seconds) for seconds in (1.9, 2.0, 2.1)])
    assert curve.seconds(1_000, 0) == pytest.approx(2.0, rel=0.01)
    assert curve.seconds(0, 0) == 0.0


def test_time_that_falls_with_size_is_a_fixed_cost() -> None:
    """A bandwidth below zero is never fitted."""
    curve = fit_link([TransferSample(1_000, 2.0), TransferSample(1_000_000, 1.0)])
    assert curve.per_byte_s == 0.0
    assert 1.0 <= curve.latency_s <= 2.0


def test_bytes_that_cost_next_to_nothing_have_no_bandwidth() -> None:
    """What a refit leaves of a coefficient of 0 is no figure to show."""
    assert LinkCurve(0.055, 7.9e-15).bytes_per_s is None
    assert LinkCurve(0.055, 0.0).bytes_per_s is None
    assert LinkCurve(0.055, 4e-12).bytes_per_s == pytest.approx(250e9)


def test_empty_transfers_measure_the_latency() -> None:
    """Samples of no bytes give a fixed cost alone."""
    assert astuple(fit_link([TransferSample(0, 0.25)])) == pytest.approx(
        (0.25, 0.0), rel=1e-9, abs=0.0
    )


def test_no_samples_give_no_curve() -> None:
    """Nothing measured is an error that says so."""
    with pytest.raises(CurveError, match="0 samples"):
        fit_prefill([])
    with pytest.raises(CurveError, match="0 samples"):
        fit_link([])


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_a_curve_has_no_negative_or_boundless_cost(bad: float) -> None:
    """Coefficients are finite and at least 0."""
    with pytest.raises(CurveError, match="prefill curve"):
        PrefillCurve(0.0, 0.0, bad)
    with pytest.raises(CurveError, match="link curve"):
        LinkCurve(bad, 0.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_took_some_time(bad: float) -> None:
    """A clock that stood still or went back is refused where it is read."""
    with pytest.raises(CurveError, match="prefill sample"):
        PrefillSample(1, 0, bad)
    with pytest.raises(CurveError, match="transfer sample"):
        TransferSample(1, bad)


@pytest.mark.parametrize(("new", "cached"), [(0, 5), (-1, 5), (5, -1)])
def test_a_prefill_sample_computed_something(new: int, cached: int) -> None:
    """A prefill of no tokens measures nothing."""
    with pytest.raises(CurveError, match=f"new_tokens={new}, cached_tokens={cached}"):
        PrefillSample(new, cached, 1.0)


def test_a_transfer_sample_has_no_negative_size() -> None:
    """Bytes are counted from 0."""
    with pytest.raises(CurveError, match="n_bytes=-1"):
        TransferSample(-1, 1.0)
