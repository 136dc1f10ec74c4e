from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv import catalogue as catalogue_module
from kv.block import chain, pack_tokens, root_key
from kv.catalogue import Catalogue, Delta, Holder, Tier
from kv.errors import CatalogueError

PROMPTS = [chain(root_key(salt), pack_tokens(range(8)), 1) for salt in ("a", "b")]
KEYS = [key for prompt in PROMPTS for key in prompt]
P0, D0, D0_HOST = HOLDERS = [
    Holder("prefill-0", Tier.DEVICE),
    Holder("decode-0", Tier.DEVICE),
    Holder("decode-0", Tier.HOST),
]

some_holder = st.sampled_from(HOLDERS)
some_keys = st.lists(st.sampled_from(KEYS), max_size=12) | st.builds(
    lambda prompt, depth: prompt[:depth], st.sampled_from(PROMPTS), st.integers(0, 8)
)


def naive_depth(held: set[bytes], keys: list[bytes]) -> int:
    return next((depth for depth, key in enumerate(keys) if key not in held), len(keys))


class CatalogueAgainstSets(RuleBasedStateMachine):
    """A catalogue answers as one set of keys for each holder does."""

    def __init__(self) -> None:
        super().__init__()
        self.catalogue = Catalogue(shards=4)
        self.model: defaultdict[Holder, set[bytes]] = defaultdict(set)

    @rule(holder=some_holder, keys=some_keys)
    def add(self, holder: Holder, keys: list[bytes]) -> None:
        self.catalogue.add(holder, keys)
        self.model[holder].update(keys)

    @rule(holder=some_holder, keys=some_keys)
    def remove(self, holder: Holder, keys: list[bytes]) -> None:
        self.catalogue.remove(holder, keys)
        self.model[holder].difference_update(keys)

    @rule(holder=some_holder)
    def forget(self, holder: Holder) -> None:
        self.catalogue.forget(holder)
        self.model[holder].clear()

    @rule(holder=some_holder, stored=some_keys, removed=some_keys, cleared=st.booleans())
    def apply(
        self, holder: Holder, stored: list[bytes], removed: list[bytes], cleared: bool
    ) -> None:
        self.catalogue.apply(Delta(holder, tuple(stored), tuple(removed), cleared))
        kept = set() if cleared else self.model[holder] - set(removed)
        self.model[holder] = kept | set(stored)

    @rule(max_shards=st.integers(0, 6))
    def sweep(self, max_shards: int) -> None:
        self.catalogue.sweep(max_shards)

    @invariant()
    def depths_and_counts_agree(self) -> None:
        for keys in (*PROMPTS, KEYS, PROMPTS[1][3:]):
            expected = {holder: naive_depth(held, keys) for holder, held in self.model.items()}
            walked = self.catalogue.depths(keys, closed=False)
            assert walked == {holder: depth for holder, depth in expected.items() if depth}
            self.bisect_never_credits_too_little(keys, walked)
        for holder in HOLDERS:
            assert self.catalogue.blocks(holder) == len(self.model[holder])

    def bisect_never_credits_too_little(self, keys: list[bytes], walked: dict) -> None:
        """It finds the same holders; what it credits last is held, and what comes next is not."""
        found = self.catalogue.depths(keys)
        assert found.keys() == walked.keys()
        for holder, depth in found.items():
            assert depth >= walked[holder]
            assert keys[depth - 1] in self.model[holder]
            assert depth == len(keys) or keys[depth] not in self.model[holder]

    def teardown(self) -> None:
        """After a whole sweep no key is kept that nobody has."""
        while self.catalogue.sweep(3):
            pass
        kept = {key for shard in self.catalogue._shards for key in shard}
        assert kept == set().union(*self.model.values())


TestCatalogueAgainstSets = CatalogueAgainstSets.TestCase
TestCatalogueAgainstSets.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 40), max_size=80), st.integers(0, 40))
def test_a_bisect_is_exact_where_prefixes_are_closed(depths: list[int], asked: int) -> None:
    """Whatever the depths of how many holders, a bisect and a walk say the same."""
    keys = chain(root_key("c"), pack_tokens(range(40)), 1)
    catalogue = Catalogue(shards=4)
    for index, depth in enumerate(depths):
        catalogue.add(Holder(f"decode-{index}", Tier.DEVICE), keys[:depth])
    assert catalogue.depths(keys[:asked]) == catalogue.depths(keys[:asked], closed=False)


def test_a_bisect_looks_at_few_keys() -> None:
    """One holder of 128 blocks costs eight looks at most, a walk all of them."""

    class Counted(list[bytes]):
        looks = 0

        def __getitem__(self, at):
            self.looks += 1
            return super().__getitem__(at)

    keys = Counted(chain(root_key("c"), pack_tokens(range(128)), 1))
    catalogue = Catalogue()
    catalogue.add(P0, list(keys)[:77])
    assert catalogue.depths(keys) == {P0: 77}
    assert keys.looks <= 8


def test_depth_ends_at_the_first_missing_block() -> None:
    """A walk does not count blocks behind one that was removed from mid-chain."""
    catalogue = Catalogue()
    catalogue.add(P0, PROMPTS[0])
    catalogue.add(D0_HOST, PROMPTS[0][:6])
    catalogue.remove(P0, PROMPTS[0][3:4])
    assert catalogue.depths(PROMPTS[0], closed=False) == {P0: 3, D0_HOST: 6}


def test_nobody_holds_an_empty_prompt() -> None:
    """A prompt shorter than a block gives no holder any depth."""
    catalogue = Catalogue()
    catalogue.add(P0, PROMPTS[0])
    assert catalogue.depths([]) == {}


def test_tiers_of_a_replica_are_holders_of_their_own() -> None:
    """Forgetting a replica's device tier leaves its host tier."""
    catalogue = Catalogue()
    for holder in (D0, D0_HOST):
        catalogue.add(holder, PROMPTS[0])
    catalogue.forget(D0)
    assert catalogue.depths(PROMPTS[0]) == {D0_HOST: 8}


def test_a_restarted_engine_is_not_credited_with_what_it_lost() -> None:
    """Between forget and sweep, a holder that comes back has only what it stored since."""
    catalogue = Catalogue(shards=4)
    catalogue.add(P0, PROMPTS[0])
    catalogue.forget(P0)
    catalogue.add(P0, PROMPTS[0][:1])
    assert catalogue.depths(PROMPTS[0]) == {P0: 1}
    assert catalogue.blocks(P0) == 1


def test_a_bit_is_used_again_only_after_a_whole_sweep() -> None:
    """Masks stay as narrow as the holders at once, if each restart is followed by a sweep."""
    catalogue = Catalogue(shards=4)
    for _ in range(20):
        catalogue.add(P0, PROMPTS[0])
        catalogue.forget(P0)
        assert catalogue.sweep(3) == 1
        catalogue.add(D0, PROMPTS[0][:1])
        assert catalogue.depths(PROMPTS[0]) == {D0: 1}
        catalogue.forget(D0)
        assert catalogue.sweep(1) == 4
        assert catalogue.sweep(9) == 0
    assert catalogue._next_bit.bit_length() - 1 == 2


def test_a_sweep_without_forgotten_holders_touches_nothing() -> None:
    """An idle catalogue has nothing to sweep."""
    catalogue = Catalogue(shards=4)
    catalogue.add(P0, PROMPTS[0])
    assert catalogue.sweep(4) == 0


def test_sharing_masks_anew_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of shared masks is bounded, and only saves memory."""
    monkeypatch.setattr(catalogue_module, "MAX_SHARED_MASKS", 1)
    catalogue = Catalogue()
    for depth, holder in enumerate(HOLDERS, start=3):
        for key in PROMPTS[0][:depth]:
            catalogue.add(holder, [key])
            assert len(catalogue._shared_masks) <= 2
    assert catalogue.depths(PROMPTS[0]) == {P0: 3, D0: 4, D0_HOST: 5}


def test_known_groups_are_bounded_and_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who a mask stands for is remembered, but no longer than it is true."""
    monkeypatch.setattr(catalogue_module, "MAX_KNOWN_GROUPS", 1)
    catalogue = Catalogue(shards=4)
    twin = Holder("prefill-2", Tier.DEVICE)
    for depth, holder in enumerate([*HOLDERS], start=3):
        catalogue.add(holder, PROMPTS[0][:depth])
        catalogue.add(holder, PROMPTS[1][: 9 - depth])
    catalogue.add(twin, PROMPTS[0][:3])
    for _ in range(2):
        assert catalogue.depths(PROMPTS[0]) == {P0: 3, twin: 3, D0: 4, D0_HOST: 5}
        assert catalogue.depths(PROMPTS[1]) == {P0: 6, D0: 5, D0_HOST: 4}
        assert catalogue.depths(PROMPTS[0][:4]) == {P0: 3, twin: 3, D0: 4, D0_HOST: 4}
        assert len(catalogue._groups) <= 1
    catalogue.forget(P0)
    assert catalogue.sweep(4) == 0
    catalogue.add(Holder("prefill-1", Tier.DEVICE), PROMPTS[0][:3])
    found = catalogue.depths(PROMPTS[0])
    assert found == {Holder("prefill-1", Tier.DEVICE): 3, twin: 3, D0: 4, D0_HOST: 5}


def test_more_than_64_holders_are_told_apart() -> None:
    """Masks widen with the cluster."""
    catalogue = Catalogue()
    holders = [Holder(f"decode-{index}", tier) for index in range(50) for tier in Tier]
    for index, holder in enumerate(holders):
        catalogue.add(holder, PROMPTS[0][: 1 + index % 8])
    found = catalogue.depths(PROMPTS[0])
    assert found == {holder: 1 + index % 8 for index, holder in enumerate(holders)}


def test_shards_share_the_keys_evenly() -> None:
    """No shard grows to twice the mean, so none stalls when its dict grows."""
    catalogue = Catalogue(shards=16)
    catalogue.add(P0, chain(root_key(None), pack_tokens(range(8_000)), 1))
    assert max(len(shard) for shard in catalogue._shards) < 1_000


def test_a_catalogue_has_shards() -> None:
    """No shards is an error with the number."""
    with pytest.raises(CatalogueError, match="0 shards"):
        Catalogue(shards=0)
