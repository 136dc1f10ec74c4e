import random
from math import exp, log

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kv.errors import CurveError
from kv.refit import Fit, begin, observe

Terms = tuple[float, ...]


def prompt(new: int, cached: int = 0) -> Terms:
    return (1.0, float(new), float(new * (new + 2 * cached)))


def moved(n_bytes: int) -> Terms:
    return (1.0, float(n_bytes))


def cost(coefficients: Terms, terms: Terms) -> float:
    return sum(c * term for c, term in zip(coefficients, terms, strict=True))


TYPICAL = prompt(1024)
SIZES = [(64, 0), (256, 0), (1024, 0), (4096, 0), (64, 4096), (512, 2048)]
# A small model on one core, and one on a GPU.
SLOW, FAST = (0.05, 0.002, 1e-7), (0.01, 5e-6, 2e-10)
# A toy, whose steps cost more than its tokens.
SMALL = (0.007, 4e-5, 2e-9)
MIB = 2**20
LINK, TYPICAL_BYTES = (0.005, 1e-8), moved(46 * MIB)

coefficients = st.tuples(st.floats(0.0, 1.0), st.floats(1e-7, 1e-2), st.floats(0.0, 1e-6))
prompts = st.builds(prompt, st.integers(1, 100_000), st.integers(0, 100_000))
samples = st.lists(st.tuples(prompts, st.floats(0.0, 1e5)), max_size=40)


def seen(fit: Fit, true: Terms, rng: random.Random, n: int, spread: float = 0.1) -> Fit:
    """`n` prompts of mixed lengths, each some tenths off."""
    for _ in range(n):
        whole = rng.randint(32, 4096)
        terms = prompt(whole - (cached := rng.randrange(whole)), cached)
        fit = observe(fit, terms, cost(true, terms) * exp(rng.gauss(0.0, spread)))
    return fit


@given(coefficients)
def test_a_fit_begins_as_what_it_is_given(given: Terms) -> None:
    """Until something was seen it predicts what the coefficients do."""
    fit = begin(given, TYPICAL)
    for size in SIZES:
        assert fit.seconds(prompt(*size)) == pytest.approx(cost(given, prompt(*size)))


@pytest.mark.parametrize("true", [SLOW, FAST])
@pytest.mark.parametrize(
    "wrong", [(1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (3.0, 0.5, 0.0), (0.5, 1.3, 4.0)]
)
def test_known_costs_come_back_from_noisy_samples(true: Terms, wrong: Terms) -> None:
    """From a start that is right, twice too slow or misshapen, to a tenth on average after forty
    prompts, and to a quarter everywhere."""
    errors = []
    for seed in range(20):
        start = tuple(c * w for c, w in zip(true, wrong, strict=True))
        fit = seen(begin(start, TYPICAL), true, random.Random(seed), 40)
        errors += [abs(log(fit.seconds(prompt(*s)) / cost(true, prompt(*s)))) for s in SIZES]
    assert np.mean(errors) < 0.10
    assert np.quantile(errors, 0.95) < 0.25


def test_a_probe_on_busy_cores_is_mended_within_a_handful_of_requests() -> None:
    """Started at twice the cost, predictions are within a fifth after five."""
    for seed in range(20):
        fit = begin(tuple(2.0 * c for c in SLOW), TYPICAL)
        fit = seen(fit, SLOW, random.Random(seed), 5, spread=0.05)
        off = log(fit.seconds(prompt(1024)) / cost(SLOW, prompt(1024)))
        assert abs(off) < 0.2, seed


@pytest.mark.parametrize("factor", [10.0, 0.1, 3.0])
def test_a_step_is_followed_within_a_few_samples(factor: float) -> None:
    """After hundreds of samples at one level, three to five at another."""
    rng = random.Random(1)
    fit = seen(begin(SLOW, TYPICAL), SLOW, rng, 300)
    after = tuple(factor * c for c in SLOW)
    for number in range(1, 6):
        fit = seen(fit, after, rng, 1, spread=0.05)
        ratio = fit.seconds(prompt(1024)) / cost(after, prompt(1024))
        if number >= 3:
            assert 0.7 < ratio < 1.4, number


def test_a_link_whose_bandwidth_falls_keeps_its_latency() -> None:
    """Large transfers tell that bytes have become dear; small ones are still cheap."""
    fit = begin(LINK, TYPICAL_BYTES)
    slow = (LINK[0], 10.0 * LINK[1])
    for _ in range(4):
        fit = observe(fit, moved(40 * MIB), cost(slow, moved(40 * MIB)))
    assert fit.seconds(moved(40 * MIB)) == pytest.approx(cost(slow, moved(40 * MIB)), rel=0.1)
    assert fit.seconds(moved(1000)) < 2.0 * LINK[0]


def test_a_link_whose_latency_rises_keeps_its_bandwidth() -> None:
    """Small transfers tell that beginning has become dear."""
    fit = begin(LINK, TYPICAL_BYTES)
    far = (LINK[0] + 0.04, LINK[1])
    for _ in range(4):
        fit = observe(fit, moved(50_000), cost(far, moved(50_000)))
    assert fit.seconds(moved(50_000)) == pytest.approx(cost(far, moved(50_000)), rel=0.15)
    big = moved(200 * MIB)
    assert fit.seconds(big) == pytest.approx(cost(far, big), rel=0.2)


def test_a_step_that_only_large_transfers_show_is_followed_among_small_ones() -> None:
    """Small transfers that go on as before do not hide it."""
    fit, slow = begin(LINK, TYPICAL_BYTES), (LINK[0], 10.0 * LINK[1])
    for _ in range(5):
        for terms in (moved(40 * MIB), moved(2000)):
            fit = observe(fit, terms, cost(slow, terms))
    assert fit.seconds(moved(40 * MIB)) == pytest.approx(cost(slow, moved(40 * MIB)), rel=0.2)
    assert fit.seconds(moved(2000)) == pytest.approx(cost(slow, moved(2000)), rel=0.5)


def test_the_noise_of_small_prompts_says_little_of_large_ones() -> None:
    """Three of 69 tokens that took four times as long, beside some of 5 that did not, made one of
    3,000 ten times as dear: it is not much more than four times as dear now."""
    fit, true = begin(SMALL, TYPICAL), cost(SMALL, prompt(3000))
    for new, cached, factor in [(5, 64, 1.0), *[(69, 0, 4.0)] * 3, (5, 64, 1.0)]:
        terms = prompt(new, cached)
        fit = observe(fit, terms, factor * cost(SMALL, terms))
        assert fit.seconds(prompt(3000)) < 5.0 * true
    assert fit.shifts == 1


@pytest.mark.parametrize("true", [SMALL, SLOW])
def test_small_prompts_that_stalled_say_how_long_they_stalled(true: Terms) -> None:
    """Three of 69 tokens that took 25 times as long, beside a crash, made one of 3,000 as many
    times as dear, so that no long prompt went there: it is dearer by their seconds, as they are."""
    fit, stall_s = begin(true, TYPICAL), 24.0 * cost(true, prompt(69))
    for _ in range(3):
        fit = observe(fit, prompt(69), stall_s + cost(true, prompt(69)))
    assert fit.shifts == 1
    for new in (69, 3000):
        known_s = fit.seconds(prompt(new))
        assert known_s == pytest.approx(stall_s + cost(true, prompt(new)), rel=0.2)


def test_small_prompts_that_were_dear_make_no_long_one_cheap() -> None:
    """Of 5 tokens ones of thrice the cost, of 69 one of twice: that is noise, and no proof that
    tokens cost nothing, as which it made prompts of 3,000 a tenth as dear."""
    true = (0.0045, 2.2e-5, 2e-9)
    fit = begin(true, TYPICAL)
    for new, cached, took_s in [(5, 64, 0.0222), (69, 0, 0.0129), (5, 64, 0.0222)]:
        fit = observe(fit, prompt(new, cached), took_s)
    assert fit.shifts == 1
    for new in (1024, 3000):
        assert cost(true, prompt(new)) <= fit.seconds(prompt(new)) < 2.0 * cost(true, prompt(new))


@pytest.mark.parametrize("true", [(0.0045, 2.2e-5, 2e-9), SLOW, FAST])
def test_stalls_of_small_prompts_leave_long_ones_as_they_are(true: Terms) -> None:
    """Sixty of up to 69 tokens, off by 40 %, each fourth of which stalls for up to a hundred times
    what it takes, make 3,000 tokens neither much cheaper nor much dearer than a stall."""
    ratios = []
    for seed in range(50):
        rng, fit = random.Random(seed), begin(true, TYPICAL)
        for _ in range(60):
            terms = prompt(*rng.choice([(5, 64), (20, 0), (69, 0)]))
            stall_s = rng.choice([0.0, 0.0, 0.0, rng.choice([4.0, 20.0, 100.0])]) * true[0]
            fit = observe(fit, terms, cost(true, terms) * exp(rng.gauss(0.0, 0.4)) + stall_s)
        ratios.append(fit.seconds(prompt(3000)) / cost(true, prompt(3000)))
    assert 0.5 < np.median(ratios) < 2.0
    assert np.quantile(ratios, 0.05) > 0.2
    assert np.quantile(ratios, 0.75) < 3.0


def test_a_machine_that_is_slower_is_known_by_prompts_of_half_the_length() -> None:
    """All terms are dearer then, not the constant one alone."""
    fit = begin(SLOW, TYPICAL)
    for _ in range(3):
        fit = observe(fit, prompt(512), 4.0 * cost(SLOW, prompt(512)))
    assert fit.seconds(prompt(3000)) == pytest.approx(4.0 * cost(SLOW, prompt(3000)), rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0.1, 10.0)), min_size=1, max_size=20))
def test_no_level_changes_a_typical_request_by_much_more_than_samples_were_off(
    seen: list[tuple[int, float]],
) -> None:
    """Whatever small prompts took; nor the other way."""
    fit = begin(SLOW, TYPICAL)
    for new, factor in seen:
        before, off = fit, abs(log(factor * cost(SLOW, prompt(new)) / fit.seconds(prompt(new))))
        offs = [abs(each.surprise) for each in fit.recent]
        fit = observe(fit, prompt(new), factor * cost(SLOW, prompt(new)))
        if fit.shifts > before.shifts:
            moved_by = log(fit.seconds(TYPICAL) / before.seconds(TYPICAL))
            dear = factor * cost(SLOW, prompt(new)) > before.seconds(prompt(new))
            assert -1e-6 <= (moved_by if dear else -moved_by) <= 1.25 * max(off, *offs) + 1e-6


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_single_outlier_hardly_moves_it(factor: float) -> None:
    """Whether a hiccup or a clock that stood still; nor do two with others between."""
    rng = random.Random(3)
    fit = seen(begin(SLOW, TYPICAL), SLOW, rng, 100)
    for _ in range(2):
        before = fit.seconds(TYPICAL)
        fit = observe(fit, TYPICAL, factor * cost(SLOW, TYPICAL))
        assert abs(log(fit.seconds(TYPICAL) / before)) < 0.05
        fit = seen(fit, SLOW, rng, 10)
    assert fit.shifts == 0


def test_an_outlier_at_the_very_start_is_no_level() -> None:
    """What is known of a new curve is little, yet one sample is one sample."""
    fit = observe(begin(SLOW, TYPICAL), TYPICAL, 100.0 * cost(SLOW, TYPICAL))
    assert fit.seconds(TYPICAL) < 1.3 * cost(SLOW, TYPICAL)


def test_noise_alone_is_no_new_level() -> None:
    """With a spread of 20 % the level stays, over a thousand requests."""
    rng = random.Random(5)
    fit, worst = begin(SLOW, TYPICAL), 0.0
    for _ in range(1000):
        fit = seen(fit, SLOW, rng, 1, spread=0.2)
        worst = max(worst, abs(log(fit.seconds(TYPICAL) / cost(SLOW, TYPICAL))))
    assert fit.shifts <= 2
    assert worst < 0.5


def test_what_traffic_does_not_show_is_kept() -> None:
    """After thousands of prompts of one length, others are priced as before, and can be learned."""
    rng = random.Random(7)
    fit = seen(begin(SLOW, TYPICAL), SLOW, rng, 100)
    for _ in range(3000):
        fit = observe(fit, prompt(256), cost(SLOW, prompt(256)) * exp(rng.gauss(0.0, 0.1)))
    for size in SIZES:
        assert 0.6 < fit.seconds(prompt(*size)) / cost(SLOW, prompt(*size)) < 1.6
    dear = (SLOW[0], SLOW[1], 10.0 * SLOW[2])
    fit = seen(fit, dear, rng, 30)
    assert fit.seconds(prompt(4096)) == pytest.approx(cost(dear, prompt(4096)), rel=0.3)


@given(coefficients, samples, st.integers(1, 3))
@example((0.0, 1e-7, 0.0), [(prompt(1), 1e5), (prompt(100_000), 1e-9)] * 20, 1)
def test_costs_are_never_negative_and_never_fall(
    given: Terms, seen: list[tuple[Terms, float]], patience: int
) -> None:
    """Whatever was seen: coefficients are finite and at least 0, so that more tokens never cost
    less, and what is known is neither negative nor without bound."""
    fit = begin(given, TYPICAL)
    for terms, seconds in seen:
        fit = observe(fit, terms, seconds, patience)
    known = fit.coefficients()
    assert all(0.0 <= c < 1e300 for c in known)
    assert fit.seconds(prompt(100)) <= fit.seconds(prompt(101)) <= fit.seconds(prompt(101, 5))
    spread = np.linalg.eigvalsh(np.array(fit.covariance))
    assert spread.min() > -1e-12
    assert spread.max() <= 1.0 + 1e-12


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_took_no_time_says_nothing(seconds: float) -> None:
    """Nor what never ended."""
    fit = begin(SLOW, TYPICAL)
    assert observe(fit, prompt(100), seconds) == fit


@pytest.mark.parametrize(
    ("given", "typical"),
    [
        ((0.0, 0.0, 0.0), TYPICAL),
        ((-1e-9, 1.0, 0.0), TYPICAL),
        ((float("nan"), 1.0, 0.0), TYPICAL),
        (SLOW, (1.0, 0.0, 0.0)),
    ],
)
def test_a_curve_that_costs_nothing_cannot_be_refitted(given: Terms, typical: Terms) -> None:
    """Logarithms need a cost; the error says of what."""
    with pytest.raises(CurveError, match="fit: coefficients"):
        begin(given, typical)
