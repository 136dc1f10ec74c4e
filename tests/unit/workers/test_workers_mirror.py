from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv.block import chain, pack_tokens, root_key, split_keys
from workers.mirror import Mirror

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


class MirrorAgainstSets(RuleBasedStateMachine):
    """Whatever an engine stores and evicts, the mirror holds the right keys, and the changes it
    gives add up to them."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror()
        self.held: dict[bytes, bytes] = {}
        self.followed: set[bytes] = set()

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
        if parent is None or parent in self.held:
            self.held.update(zip(names, keys, strict=True))

    @rule(prompt=some_prompt, index=st.integers(0, 2))
    def remove(self, prompt: Named, index: int) -> None:
        for name in prompt.names[index : index + 1]:
            self.mirror.remove([name, b"never stored"])
            self.held.pop(name, None)

    @rule()
    def clear(self) -> None:
        self.mirror.clear()
        self.held.clear()

    @rule()
    def take(self) -> None:
        change = self.mirror.take()
        stored, removed = set(split_keys(change.stored)), set(split_keys(change.removed))
        assert not stored & removed
        assert not stored & self.followed, "told twice"
        assert removed <= self.followed, "removal of what was never told"
        self.followed = self.followed - removed | stored
        assert self.followed == set(self.held.values())
        assert not self.mirror.take()

    @invariant()
    def the_snapshot_is_what_is_held(self) -> None:
        snapshot = split_keys(self.mirror.snapshot())
        assert sorted(snapshot) == sorted(self.held.values())
        assert len(self.mirror) == len(self.held)


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
    assert split_keys(mirror.take().stored) == prompt.keys


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
