"""Which parts of a shard's memory are taken."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv.errors import VaultError
from kv.vault.arena import Arena, Extent, trimmed

GRANULE = 8


class ArenaAgainstBytes(RuleBasedStateMachine):
    """Whatever is taken and given back in whatever order: nothing is given to two, nothing is lost,
    and whatever fits by bytes is placed."""

    @initialize(n_granules=st.integers(1, 30))
    def start(self, n_granules: int) -> None:
        self.arena = Arena(n_granules * GRANULE + 3, GRANULE)
        self.owners: list[int | None] = [None] * (n_granules * GRANULE)
        self.given: dict[int, tuple[Extent, ...]] = {}
        self.count = 0

    @rule(n_bytes=st.integers(1, 120))
    def take(self, n_bytes: int) -> None:
        free_bytes = self.owners.count(None)
        extents = self.arena.take(n_bytes)
        assert (extents is None) == (self.arena.charge(n_bytes) > free_bytes)
        if extents is None:
            return
        self.count += 1
        for offset, length in extents:
            assert self.owners[offset : offset + length] == [None] * length
            self.owners[offset : offset + length] = [self.count] * length
        assert sum(length for _, length in extents) == self.arena.charge(n_bytes)
        assert sum(length for _, length in trimmed(extents, n_bytes)) == n_bytes
        self.given[self.count] = extents

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        if not self.given:
            return
        which = data.draw(st.sampled_from(sorted(self.given)))
        self.arena.give(self.given.pop(which))
        self.owners = [None if owner == which else owner for owner in self.owners]

    @invariant()
    def holes_have_coalesced(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_integrity()
        assert self.arena.free_bytes == self.owners.count(None)
        longest = max(map(len, "".join("t" if o else " " for o in self.owners).split("t")))
        if longest:
            (extent,) = self.arena.take(longest) or ()
            self.arena.give((extent,))


TestArena = ArenaAgainstBytes.TestCase


def test_a_block_lies_in_one_piece_while_there_is_one() -> None:
    """The smallest hole that is large enough is used, though larger ones come first."""
    arena = Arena(100 * GRANULE, GRANULE)
    parts = [arena.take(n * GRANULE) for n in (10, 1, 3, 1, 85)]
    for at in (0, 2):
        arena.give(parts[at] or ())
    assert arena.take(3 * GRANULE) == parts[2]


def test_what_fits_nowhere_in_one_piece_is_scattered() -> None:
    """Every second granule free is room for half the arena."""
    arena = Arena(8 * GRANULE, GRANULE)
    parts = [arena.take(GRANULE) for _ in range(8)]
    for part in parts[::2]:
        arena.give(part or ())
    scattered = arena.take(4 * GRANULE)
    assert scattered is not None
    assert len(scattered) == 4
    assert arena.free_bytes == 0


def test_giving_back_twice_is_refused() -> None:
    """Two owners of one part would follow."""
    arena = Arena(4 * GRANULE, GRANULE)
    extents = arena.take(GRANULE) or ()
    arena.give(extents)
    with pytest.raises(VaultError, match="0 taken"):
        arena.give(extents)


@pytest.mark.parametrize(("n_bytes", "granule_bytes"), [(0, 8), (7, 8), (100, 0)])
def test_an_arena_of_nothing_is_refused(n_bytes: int, granule_bytes: int) -> None:
    """A shard without memory could store nothing."""
    with pytest.raises(VaultError):
        Arena(n_bytes, granule_bytes)
