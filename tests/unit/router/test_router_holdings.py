from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
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


def test_what_was_evicted_and_is_asked_for_is_regretted() -> None:
    """Only what left the paged KV of whoever had it last, and not what left a tier behind."""

    def regret(held_by_another: bool, tier: Tier = Tier.DEVICE) -> float:
        holdings = Holdings()
        holdings.follow("a", Blocks(0, stored=joined(*range(8)), snapshot=True))
        holdings.follow("b", Blocks(0, stored=joined(*range(8)), snapshot=True))
        keys = [bytes([2, number]) * 8 for number in range(200)]
        others = b"".join(bytes([3, number]) * 8 for number in range(200))
        holdings.follow("b", Blocks(1, stored=others))
        for epoch in ("a", "b") if held_by_another else ("a",):
            holdings.follow(epoch, Blocks(1, stored=b"".join(keys), tier=tier))
        holdings.follow("a", Blocks(2, removed=b"".join(keys), tier=tier))
        for start in range(0, 8):
            holdings.asked(keys[start:], holdings.look("me", keys[start:]))
        return holdings.regret

    assert regret(held_by_another=False) > 0.5
    assert regret(held_by_another=True) == 0.0
    assert regret(held_by_another=False, tier=Tier.HOST) == 0.0


def test_a_snapshot_replaces() -> None:
    """What it lacks is gone."""
    holdings = Holdings()
    holdings.follow("a", Blocks(0, stored=joined(0, 1), snapshot=True))
    holdings.follow("a", Blocks(0, stored=joined(0), snapshot=True))
    assert holdings.look("me", KEYS).depths == {"a": 1}


def test_tiers_count_where_they_hold_more_than_the_device() -> None:
    """What left the device is found in the tiers of the same engine, until it leaves those too."""
    holdings = Holdings()
    holdings.follow("a", Blocks(0, stored=joined(0, 1, 2), snapshot=True))
    holdings.follow("a", Blocks(1, stored=joined(0, 1, 2), tier=Tier.HOST))
    holdings.follow("a", Blocks(2, stored=joined(0, 1), tier=Tier.DISK))
    assert holdings.look("me", KEYS) == Found({"a": 3})
    holdings.follow("a", Blocks(3, removed=joined(1, 2)))
    assert holdings.look("me", KEYS) == Found({"a": 1}, {}, {"a": {Tier.HOST: 3, Tier.DISK: 2}})
    holdings.follow("a", Blocks(4, removed=joined(0)))
    holdings.follow("a", Blocks(5, removed=joined(0, 1, 2), tier=Tier.HOST))
    assert holdings.look("me", KEYS) == Found({}, {}, {"a": {Tier.DISK: 2}})


def test_what_is_in_a_vault_counts_beside_the_device() -> None:
    """Another engine, which has nothing, can fetch it."""
    holdings = Holdings()
    holdings.follow("a", Blocks(0, stored=joined(0, 1, 2), snapshot=True))
    holdings.follow("a", Blocks(1, stored=joined(0, 1), tier=Tier.VAULT))
    assert holdings.look("me", KEYS) == Found({"a": 3}, {}, {"a": {Tier.VAULT: 2}})


def test_a_restarted_engine_has_no_tier_of_its_predecessor() -> None:
    """Whatever it held in host memory is gone with it, at once; what it left on disk is told by
    the engine that finds it."""
    holdings = Holdings()
    for number, tier in enumerate((Tier.DEVICE, Tier.HOST, Tier.DISK)):
        holdings.follow("a/1", Blocks(number, joined(0, 1), snapshot=not number, tier=tier))
    holdings.forget("a/1")
    holdings.follow("a/2", Blocks(0, snapshot=True))
    assert holdings.look("me", KEYS) == Found()
    assert [holdings.blocks("a/1", tier) for tier in Tier] == [0] * len(Tier)
    while holdings.sweep(4096):
        pass
    assert not any(holdings._catalogue._shards)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from([Tier.DEVICE, Tier.HOST, Tier.DISK]),
            st.sets(st.integers(0, 7)),
            st.sets(st.integers(0, 7)),
            st.sampled_from(["change"] * 6 + ["snapshot", "forget"]),
        ),
        max_size=20,
    )
)
def test_holdings_are_sets_by_engine_and_tier(
    steps: list[tuple[str, Tier, set[int], set[int], str]],
) -> None:
    """Whatever is told, each tier of each engine has the blocks that a set of its own would."""
    holdings, model = Holdings(), dict[tuple[str, Tier], set[int]]()
    for epoch, tier, stored, removed, what in steps:
        if what != "change":
            model = {holder: held for holder, held in model.items() if holder[0] != epoch}
        if what == "forget":
            holdings.forget(epoch)
            continue
        removed = set() if what == "snapshot" else removed - stored
        blocks = Blocks(0, joined(*stored), joined(*removed), what == "snapshot", tier=tier)
        holdings.follow(epoch, blocks)
        model[epoch, tier] = model.get((epoch, tier), set()) - removed | stored
    for epoch in "ab":
        for tier in Tier:
            assert holdings.blocks(epoch, tier) == len(model.get((epoch, tier), ()))


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
