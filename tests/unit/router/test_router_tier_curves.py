"""What fetching from tiers is taken to cost where a replica knows little of it itself."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.fetch import GUESSES
from kv.refit import SHIFT_AFTER
from router.curve_book import LEAST_SAMPLES, Book, KeptLink
from router.member import Member
from router.tier_curves import curve_of, peer_of, tiers_of, worth_keeping
from workers.messages import FetchLoad, Load, LossyLoad, Role, TierLoad
from workers.sim import SimCosts, sim_replica

TIERS = (Tier.HOST, Tier.DISK, Tier.VAULT)
some_samples = st.integers(0, 20)


def member(name: str, tiers: dict[Tier, TierLoad], hardware: str = "cpu", **load: object) -> Member:
    replica = sim_replica(name, Role.DECODE, SimCosts(), hardware=hardware)
    made = Member(replica, lambda _: None, lambda m, b: None, lambda: 0.0)  # type: ignore[arg-type,return-value]
    made.load = Load(tiers=tiers, **load)  # type: ignore[arg-type]
    return made


def told(latency_s: float, samples: int, lossy: int | None = None, share: float = 0.3) -> TierLoad:
    rounded = None if lossy is None else LossyLoad(latency_s / 2, 1e-9, lossy, (), share)
    return TierLoad(7, 2, latency_s, 2e-9, samples, rounded)


@given(st.dictionaries(st.sampled_from(TIERS), some_samples), some_samples, some_samples)
def test_who_fetched_seldom_goes_by_what_those_like_it_knew(
    samples: dict[Tier, int], lossy: int, peer: int
) -> None:
    """Tier by tier, lossy blocks and those of peers apart: until it can tell a new level from an
    outlier. What it holds, and how often it has fetched, is its own."""
    every = {tier: told(0.001 * (1 + at), 50, 50) for at, tier in enumerate(TIERS)}
    kept = worth_keeping([member("old", every, peer=FetchLoad(0.001, 1e-9, 50))])
    asks = member(
        "new",
        {tier: told(0.5, n, lossy) for tier, n in samples.items()},
        peer=FetchLoad(9.0, 3e-9, peer),
    )
    known = tiers_of(asks.replica, asks.load.tiers, kept)
    assert list(known) == list(asks.load.tiers)
    for tier, own in asks.load.tiers.items():
        believed = own if own.samples >= SHIFT_AFTER else every[tier]
        assert curve_of(known[tier]) == curve_of(believed)
        assert (known[tier].blocks, known[tier].unnamed, known[tier].samples) == (7, 2, own.samples)
        of_own, of_old, shown = own.lossy, every[tier].lossy, known[tier].lossy
        assert of_own is not None
        assert of_old is not None
        assert shown is not None
        assert curve_of(shown) == curve_of(of_own if lossy >= SHIFT_AFTER else of_old)
    lent = peer_of(asks.replica, asks.load.peer, kept)
    assert lent.latency_s == (9.0 if peer >= SHIFT_AFTER else 0.001)


def test_what_was_slow_once_is_tried_again() -> None:
    """By whoever knows nothing of it: priced by that it would not be fetched from, and nobody would
    learn that it is fast now."""
    every = {tier: told(5.0, 50, 50) for tier in TIERS}
    kept = worth_keeping([member("old", every, peer=FetchLoad(9.0, 3e-9, 50))])
    asks = member("new", {tier: told(0.02, 0, 0) for tier in TIERS}, peer=None)
    assert tiers_of(asks.replica, asks.load.tiers, kept) == asks.load.tiers
    assert curve_of(peer_of(asks.replica, None, kept)) == GUESSES[Tier.PEER]


def test_another_s_hardware_or_codec_says_nothing() -> None:
    """Nor does one that does not say what it runs on, to anybody."""
    every = {tier: told(0.5, 50, 50) for tier in TIERS}
    for hardware, share in (("gpu", 0.3), ("", 0.3)):
        kept = worth_keeping([member("old", every, hardware), member("x", every, "")])
        asks = member("new", {Tier.VAULT: told(5.0, 0, 0, share)})
        assert tiers_of(asks.replica, asks.load.tiers, kept) == asks.load.tiers
    kept = worth_keeping([member("old", every)])
    asks = member("new", {Tier.VAULT: told(5.0, 0, 0, 0.6)})
    known = tiers_of(asks.replica, asks.load.tiers, kept)[Tier.VAULT]
    assert known.latency_s == 0.5
    assert known.lossy == asks.load.tiers[Tier.VAULT].lossy
    nobody = msgspec.structs.replace(asks.replica, hardware="")
    assert tiers_of(nobody, asks.load.tiers, kept) == asks.load.tiers
    assert worth_keeping([member("x", every, "")]) == {}


def test_a_peer_s_blocks_cost_a_guess_until_one_was_lent() -> None:
    """What was told then counts."""
    replica = member("a", {}).replica
    assert curve_of(peer_of(replica, None, {})) == GUESSES[Tier.PEER]
    assert curve_of(peer_of(replica, FetchLoad(0.4, 1e-9, 1), {})).latency_s == 0.4


@given(st.lists(some_samples, min_size=1, max_size=5))
def test_of_several_that_is_kept_of_which_most_is_known(samples: list[int]) -> None:
    """If that is enough; it is a book's to keep."""
    members = [member(f"d{at}", {Tier.DISK: told(0.1 + at, n)}) for at, n in enumerate(samples)]
    kept = worth_keeping(members)
    if max(samples) < LEAST_SAMPLES:
        assert kept == {}
        return
    (one,) = kept.values()
    assert one.samples == max(samples)
    assert one.latency_s - 0.1 == pytest.approx(
        max(at for at, n in enumerate(samples) if n == max(samples))
    )
    assert Book().with_(Book(tiers=kept)).tiers == kept
    assert all(isinstance(each, KeptLink) for each in kept.values())
