from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv.block import chain, pack_tokens, root_key, split_keys
from kv.catalogue import Tier
from workers.mirror import Change, Mirror

BLOCK_TOKENS = 2
SALTS = (None, "a")
# Prompts that share a first block, or all of it.
PROMPTS = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 9), (1, 2, 7, 7), (8, 8, 8, 8))


@dataclass(frozen=True, slots=True)
class Named:
    """A prompt's blocks under the engine's names and under the catalogue's."""

    token_ids: tuple[int, ...]
    salt: str | None

    @property
    def names(self) -> list[bytes]:
        """Any naming does that, like vLLM's, tells salts and prefixes apart."""
        ends = range(BLOCK_TOKENS, len(self.token_ids) + 1, BLOCK_TOKENS)
        return [repr((self.salt, self.token_ids[:end])).encode() for end in ends]

    @property
    def keys(self) -> list[bytes]:
        return chain(root_key(self.salt), pack_tokens(self.token_ids), BLOCK_TOKENS)


ALL = [Named(prompt, salt) for prompt in PROMPTS for salt in SALTS]
some_prompt = st.sampled_from(ALL)
some_tier = st.sampled_from(Tier)


class MirrorAgainstSets(RuleBasedStateMachine):
    """Whatever an engine stores and evicts in which tier, the mirror holds the right keys of each,
    and the changes it gives add up to them.

    The model has the names that each tier holds, and which of them can be named: those whose chain
    was told when they were on the device, for as long as any tier holds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror()
        self.held: dict[Tier, set[bytes]] = {tier: set() for tier in Tier}
        self.named: dict[bytes, bytes] = {}
        self.followed: dict[Tier, set[bytes]] = {tier: set() for tier in Tier}

    @rule(prompt=some_prompt, start=st.integers(0, 2), count=st.integers(1, 3))
    def store(self, prompt: Named, start: int, count: int) -> None:
        """As vLLM tells it: a run of blocks behind a parent, which may be unknown by now."""
        names, keys = prompt.names[start : start + count], prompt.keys[start : start + count]
        parent = prompt.names[start - 1] if 0 < start <= len(prompt.names) else None
        token_ids = prompt.token_ids[start * BLOCK_TOKENS : (start + count) * BLOCK_TOKENS]
        if not names:
            return
        self.mirror.store(
            names, parent, token_ids, BLOCK_TOKENS, prompt.salt if not start else None
        )
        if parent is None or parent in self.named:
            self.named.update(zip(names, keys, strict=True))
            self.held[Tier.DEVICE].update(names)

    @rule(prompt=some_prompt, index=st.integers(0, 2), tier=st.sampled_from(list(Tier)[1:]))
    def copy(self, prompt: Named, index: int, tier: Tier) -> None:
        """A tier tells a name and nothing else, known or not, once or again."""
        names = prompt.names[index : index + 1]
        self.mirror.hold(tier, names)
        self.held[tier].update(names)

    @rule(prompt=some_prompt, index=st.integers(0, 2), tier=some_tier)
    def remove(self, prompt: Named, index: int, tier: Tier) -> None:
        for name in prompt.names[index : index + 1]:
            self.mirror.remove([name, b"never stored"], tier)
            self.held[tier].discard(name)

    @rule(tier=some_tier)
    def clear(self, tier: Tier) -> None:
        self.mirror.clear(tier)
        self.held[tier].clear()

    @rule()
    def take(self) -> None:
        changes = self.mirror.take()
        assert len({change.tier for change in changes}) == len(changes)
        for change in changes:
            stored, removed = set(split_keys(change.stored)), set(split_keys(change.removed))
            followed = self.followed[change.tier]
            assert stored or removed
            assert not stored & removed
            assert not stored & followed, "told twice"
            assert removed <= followed, "removal of what was never told"
            self.followed[change.tier] = followed - removed | stored
        anywhere = set().union(*self.held.values())
        self.named = {name: key for name, key in self.named.items() if name in anywhere}
        for tier in Tier:
            assert self.followed[tier] == self.keys(tier)
        assert self.mirror.take() == ()
        assert self.mirror._keys == self.named, "names that no tier holds are kept"

    def keys(self, tier: Tier) -> set[bytes]:
        return {self.named[name] for name in self.held[tier] if name in self.named}

    @invariant()
    def the_snapshot_is_what_is_held(self) -> None:
        for tier in Tier:
            snapshot = split_keys(self.mirror.snapshot(tier))
            assert len(snapshot) == len(set(snapshot))
            assert set(snapshot) == self.keys(tier)
            assert self.mirror.blocks(tier) == len(self.held[tier])
            assert self.mirror.unnamed(tier) == len(self.held[tier]) - len(snapshot)
        assert len(self.mirror) == len(self.held[Tier.DEVICE])


TestMirrorAgainstSets = MirrorAgainstSets.TestCase
TestMirrorAgainstSets.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_blocks_told_one_by_one_have_the_keys_of_the_whole_prompt() -> None:
    """How an engine cuts its events does not change a key, nor does its own naming."""
    prompt = Named((1, 2, 3, 4, 5, 6), "tenant")
    mirror = Mirror()
    parent, salt = None, prompt.salt
    for index, name in enumerate(prompt.names):
        token_ids = prompt.token_ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        mirror.store([name], parent, token_ids, BLOCK_TOKENS, salt)
        parent, salt = name, None
    [change] = mirror.take()
    assert split_keys(change.stored) == prompt.keys


def test_a_block_behind_an_unknown_parent_is_left_out() -> None:
    """Its key cannot be computed; it is a lost hit, never a wrong one."""
    mirror = Mirror()
    mirror.store([b"x"], b"unknown", [1, 2], BLOCK_TOKENS, None)
    assert len(mirror) == 0
    assert not mirror.take()


def test_what_came_and_went_between_two_reports_is_no_news() -> None:
    """A block stored and evicted again costs no message."""
    mirror = Mirror()
    mirror.store([b"x"], None, [1, 2], BLOCK_TOKENS, None)
    mirror.remove([b"x"])
    assert not mirror.take()


def test_a_block_that_leaves_the_device_stays_in_its_tiers() -> None:
    """Also where vLLM tells of the eviction before it tells of the copy, in one report."""
    prompt, mirror = Named((1, 2, 3, 4), "tenant"), Mirror()
    mirror.store(prompt.names, None, prompt.token_ids, BLOCK_TOKENS, prompt.salt)
    mirror.hold(Tier.HOST, prompt.names)
    mirror.take()
    mirror.remove(prompt.names)
    mirror.hold(Tier.DISK, prompt.names)
    joined = b"".join(prompt.keys)
    assert set(mirror.take()) == {Change(b"", joined), Change(joined, b"", Tier.DISK)}
    mirror.remove(prompt.names, Tier.HOST)
    mirror.remove(prompt.names, Tier.DISK)
    mirror.take()
    assert mirror._keys == {}


def test_what_was_found_on_disk_is_told_once_the_device_has_named_it() -> None:
    """Files have names without tokens: until a request brings those, their blocks are counted."""
    prompt, mirror = Named((1, 2, 3, 4), None), Mirror()
    mirror.hold(Tier.DISK, prompt.names)
    assert mirror.take() == ()
    assert (mirror.blocks(Tier.DISK), mirror.unnamed(Tier.DISK)) == (2, 2)
    mirror.store(prompt.names[:1], None, prompt.token_ids[:2], BLOCK_TOKENS, None)
    key = prompt.keys[0]
    assert set(mirror.take()) == {Change(key), Change(key, b"", Tier.DISK)}
    assert mirror.unnamed(Tier.DISK) == 1
