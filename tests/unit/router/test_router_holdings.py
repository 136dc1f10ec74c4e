from hypothesis import given
from hypothesis import strategies as st

from router.catalogue.holdings import Expectations, Holdings
from router.catalogue.wire import Expect, Found, Taken
from workers.messages import Blocks

KEYS = [bytes([number]) * 16 for number in range(8)]


def joined(*numbers: int) -> bytes:
    return b"".join(KEYS[number] for number in numbers)


def test_blocks_are_followed_by_epoch() -> None:
    """A snapshot, then changes; another engine of the same replica has blocks of its own."""
    holdings = Holdings()
    holdings.follow("a/1", Blocks(0, stored=joined(0, 1, 2), snapshot=True))
    holdings.follow("a/1", Blocks(1, stored=joined(3), removed=joined(2)))
    holdings.follow("a/2", Blocks(0, stored=joined(0), snapshot=True))
    assert holdings.look("me", KEYS).depths == {"a/1": 2, "a/2": 1}
    holdings.forget("a/1")
    assert holdings.look("me", KEYS).depths == {"a/2": 1}
    assert (holdings.blocks("a/1"), holdings.blocks("a/2")) == (0, 1)


def test_a_snapshot_replaces() -> None:
    """What it lacks is gone."""
    holdings = Holdings()
    holdings.follow("a", Blocks(0, stored=joined(0, 1), snapshot=True))
    holdings.follow("a", Blocks(0, stored=joined(0), snapshot=True))
    assert holdings.look("me", KEYS).depths == {"a": 1}


def test_what_others_expect_counts_and_ones_own_does_not() -> None:
    """An ingress knows its own requests better than the catalogue does."""
    holdings = Holdings()
    holdings.expect("me", Expect("1", "a", 300, joined(0, 1, 2)))
    holdings.expect("you", Expect("1", "b", 200, joined(0, 1)))
    holdings.expect("you", Expect("2", "b", 0))
    assert holdings.look("me", KEYS) == Found({"b": 2}, {"b": Taken(2, 1, 200)})
    assert holdings.look("you", KEYS) == Found({"a": 3}, {"a": Taken(1, 1, 300)})
    holdings.met("you", "1")
    assert holdings.look("me", KEYS) == Found({}, {"b": Taken(1, 0, 0)})
    holdings.leave("you")
    assert holdings.look("me", KEYS) == Found()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans())))
def test_what_is_met_leaves_nothing(steps: list[tuple[str, int, bool]]) -> None:
    """However expectations are opened, replaced and met in between: with all of them met nothing
    is expected of anybody."""
    expected = Expectations()
    for epoch, number, opens in steps:
        if opens:
            expected.add(Expect(str(number), epoch, 32 * number, joined(*range(number))))
        else:
            expected.remove(str(number))
    for open_one in expected.open():
        expected.remove(open_one.name)
    assert expected.all_taken() == {}
    assert expected.depths(KEYS) == {}
