"""The curves of tiers that an engine tells."""

from itertools import chain

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES
from workers.fetches import ASKING_S, Fetches
from workers.messages import Sources, Spent

TIERS = (Tier.HOST, Tier.DISK, Tier.VAULT)
MIB = 2**20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def made(clock: Clock) -> Fetches:
    return Fetches(TIERS, clock)


def borrow(fetches: Fetches, clock: Clock, n_bytes: int, seconds: float) -> None:
    """Blocks came so long after they were asked for."""
    clock.now_s += seconds
    fetches.borrowed(n_bytes, seconds)


def vaults(
    tokens: int, loading_s: float, others: int = 0, lossy: bool = False
) -> tuple[Sources, Spent]:
    """A request whose prefix the vault brought."""
    n_bytes = tokens * 50_000
    spent = Spent(0.0, loading_s, 0.1, n_bytes, others, lossy)
    return Sources(tokens + 1, 1, 0, 0, vault_tokens=tokens), spent


PAIRS = st.tuples(st.integers(2, 16), st.integers(24, 64))


@given(st.floats(1e-10, 1e-7), st.lists(PAIRS, min_size=10, max_size=10))
@example(8.33e-08, [(2, 24)] * 10)
def test_what_a_peer_s_blocks_cost_is_found_out(
    per_byte_s: float, pairs: list[tuple[int, int]]
) -> None:
    """Faster than was guessed or slower, within what asking takes and what seconds scatter, for
    small loads and for large ones; one size in twenty of another kind would be an outlier."""
    clock, link, sizes = Clock(), LinkCurve(0.004, per_byte_s), list(chain(*pairs))
    fetches = made(clock)
    for size in 2 * sizes:
        borrow(fetches, clock, size * MIB, link.seconds(size * MIB))
    host_per_byte_s, curve = GUESSES[Tier.HOST].per_byte_s, fetches.curve(Tier.PEER)
    for size in sizes:
        least_s = link.seconds(size * MIB) + host_per_byte_s * size * MIB
        assert 0.6 * least_s < curve.seconds(size * MIB) < 1.6 * (least_s + ASKING_S + 0.002)


def test_a_peer_s_link_that_was_slow_comes_down_again() -> None:
    """By what is seen, not by time alone."""
    clock = Clock()
    fetches = made(clock)
    for _ in range(8):
        borrow(fetches, clock, 16 * MIB, 2.0)
    assert fetches.curve(Tier.PEER).seconds(16 * MIB) > 1.5
    for _ in range(8):
        borrow(fetches, clock, 16 * MIB, 0.03)
    assert fetches.curve(Tier.PEER).seconds(16 * MIB) < 0.1


def test_an_engine_without_tiers_tells_nothing_of_peers() -> None:
    """And one that borrowed nothing has only a guess."""
    assert Fetches((), Clock()).peer() is None
    assert made(Clock()).peer() is None


def test_who_gives_way_tells_nothing() -> None:
    """It waited for its turn, and what it loads comes whenever that is; those beside it are heard,
    and its name is forgotten with its first token, or once it has ended without one."""
    clock = Clock()
    fetches = made(clock)
    guess = fetches.load(Tier.VAULT, 0, 0)
    fetches.gives_way("gone", ())
    for number in range(9):
        name = f"batch-{number}"
        fetches.gives_way(name, {name})
        fetches.waited(name, *vaults(1000, 60.0))
    assert fetches.load(Tier.VAULT, 0, 0) == guess
    for name in ("gone", *map(str, range(8))):
        fetches.waited(name, *vaults(1000, 3.0))
    assert fetches.load(Tier.VAULT, 0, 0).samples == 9
    assert fetches.curve(Tier.VAULT).seconds(50_000_000) == pytest.approx(3.0, rel=0.2)


def test_a_fetch_beside_others_says_how_long_it_took_at_most() -> None:
    """Two that share a link take twice as long each, and the link is as fast as it was; one that
    is quicker for all that shows that it has become faster."""
    fetches = made(Clock())
    for number in range(20):
        fetches.waited(f"alone-{number}", *vaults(1000, 0.5))
    alone = fetches.curve(Tier.VAULT).seconds(50_000_000)
    assert alone == pytest.approx(0.5, rel=0.1)
    for number in range(20):
        sources, spent = vaults(1000, 1.0)
        fetches.waited(f"b-{number}", sources, msgspec.structs.replace(spent, beside=True))
    assert fetches.curve(Tier.VAULT).seconds(50_000_000) == pytest.approx(alone)
    for number in range(20):
        sources, spent = vaults(1000, 0.1)
        fetches.waited(f"c-{number}", sources, msgspec.structs.replace(spent, beside=True))
    assert fetches.curve(Tier.VAULT).seconds(50_000_000) < 0.3


def test_a_curve_is_told_with_its_last_points() -> None:
    """In the seconds that a request waits, those through host memory included; the same object
    until there are others, since a load is told with each step."""
    clock = Clock()
    fetches = made(clock)
    assert fetches.load(Tier.VAULT, 0, 0).seen == ()
    for number in range(20):
        fetches.waited(str(number), *vaults(100 + number, 0.5))
    told = fetches.load(Tier.VAULT, 0, 0)
    assert [n_bytes for n_bytes, _ in told.seen] == [50_000 * (104 + n) for n in range(16)]
    assert all(seconds == pytest.approx(0.5, rel=0.01) for _, seconds in told.seen)
    assert fetches.load(Tier.VAULT, 0, 0).seen is told.seen
    assert fetches.load(Tier.HOST, 0, 0).seen == ()


def test_a_load_that_tells_nothing_of_a_lossy_codec_leaves_its_guess() -> None:
    """Its share of what whole pages cost; not what was guessed of those."""
    fetches = made(Clock())
    for number in range(9):
        fetches.waited(str(number), *vaults(1000, 0.1))
    guess = fetches.lossy_curve(Tier.VAULT, 0.25)
    fetches.copied(Tier.VAULT, True, 50_000_000, 0.001)
    assert fetches.lossy_curve(Tier.VAULT, 0.25) == guess


def test_a_lossy_codec_s_fetches_are_told_apart() -> None:
    """With the share of a page that it leaves, by which a curve is guessed until there are any."""
    clock = Clock()
    fetches = made(clock)
    guess = fetches.load(Tier.VAULT, 0, 0, 0.25).lossy
    assert guess is not None
    assert (guess.samples, guess.share, guess.seen) == (0, 0.25, ())
    for number in range(9):
        fetches.waited(str(number), *vaults(1000, 0.7, lossy=True))
    told = fetches.load(Tier.VAULT, 0, 0, 0.25)
    assert told.samples == 0
    assert told.lossy is not None
    assert told.lossy.samples == len(told.lossy.seen) == 9
    seconds = told.lossy.latency_s + told.lossy.per_byte_s * 50_000_000
    assert seconds == pytest.approx(0.7, rel=0.2)
