from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from kv.block import chain, pack_tokens, root_key, unpack_tokens
from kv.errors import BlockError

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=60)
SALTS = st.none() | st.text(max_size=8)
BLOCK_TOKENS = st.integers(1, 9)


def keys_of(salt: str | None, token_ids: list[int], block_tokens: int) -> list[bytes]:
    return chain(root_key(salt), pack_tokens(token_ids), block_tokens)


@given(TOKEN_IDS)
def test_unpacking_undoes_packing(token_ids: list[int]) -> None:
    """Packed tokens are 4 bytes each and give the same ids back."""
    packed = pack_tokens(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert unpack_tokens(packed) == token_ids


def test_tokens_are_packed_little_endian() -> None:
    """The packed form is the same on every machine."""
    assert pack_tokens([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@pytest.mark.parametrize("token_ids", [(1, 2), b"\x01\x02", range(1, 3)])
def test_any_sequence_of_ids_is_packed_alike(token_ids: Sequence[int]) -> None:
    """Bytes are ids like any others, not something packed already."""
    assert pack_tokens(token_ids) == pack_tokens([1, 2])


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "7", None])
def test_a_token_that_is_no_uint32_is_named(bad: object) -> None:
    """The error shows the position and the offending value."""
    with pytest.raises(BlockError, match=f"token 2: {bad!r} "):
        pack_tokens([5, 6, bad])  # type: ignore[list-item]


@given(SALTS, TOKEN_IDS, BLOCK_TOKENS)
def test_only_full_blocks_have_keys(
    salt: str | None, token_ids: list[int], block_tokens: int
) -> None:
    """There is one 16-byte key for each full block, and none for what is left."""
    keys = keys_of(salt, token_ids, block_tokens)
    assert len(keys) == len(token_ids) // block_tokens
    assert {len(key) for key in keys} <= {16}


@given(SALTS, TOKEN_IDS, BLOCK_TOKENS, st.data())
def test_the_chain_of_a_prefix_is_a_prefix_of_the_chain(
    salt: str | None, token_ids: list[int], block_tokens: int, data: st.DataObject
) -> None:
    """What follows a block does not change its key."""
    cut = data.draw(st.integers(0, len(token_ids)))
    keys = keys_of(salt, token_ids, block_tokens)
    assert keys_of(salt, token_ids[:cut], block_tokens) == keys[: cut // block_tokens]


@given(st.lists(SALTS, min_size=2, max_size=2, unique=True), TOKEN_IDS, BLOCK_TOKENS)
def test_different_salts_share_no_key(
    salts: list[str | None], token_ids: list[int], block_tokens: int
) -> None:
    """Tenants with different salts never name a block alike; an empty salt is not no salt."""
    one, other = (keys_of(salt, token_ids, block_tokens) for salt in salts)
    assert not set(one) & set(other)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), BLOCK_TOKENS, st.data())
def test_a_changed_token_changes_its_block_and_all_behind(
    token_ids: list[int], block_tokens: int, data: st.DataObject
) -> None:
    """Keys before the token's block stay; that block's key and all later ones change."""
    position = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids]
    changed[position] ^= 1
    keys, changed_keys = keys_of("t", token_ids, block_tokens), keys_of("t", changed, block_tokens)
    same = [one == other for one, other in zip(keys, changed_keys, strict=True)]
    first = position // block_tokens
    assert same == [index < first for index in range(len(keys))]


def test_a_key_is_the_digest_of_its_parent_and_tokens() -> None:
    """Workers and catalogues of any release compute the same keys."""
    first = xxh3_128_digest(xxh3_128_digest(b"\x01tenant") + pack_tokens([1, 2]))
    second = xxh3_128_digest(first + pack_tokens([3, 4]))
    assert keys_of("tenant", [1, 2, 3, 4, 5], 2) == [first, second]


def test_a_salt_with_a_lone_surrogate_has_a_root() -> None:
    """A salt that JSON lets through never fails a request here."""
    assert root_key("\ud800") != root_key("\ud801")


@pytest.mark.parametrize("block_tokens", [0, -1])
def test_a_block_has_tokens(block_tokens: int) -> None:
    """A block of no tokens is refused, with the number."""
    with pytest.raises(BlockError, match=f"block_tokens is {block_tokens}"):
        chain(root_key(None), b"", block_tokens)


def test_torn_tokens_are_refused() -> None:
    """Bytes that end within a token are an error, not a shorter prompt."""
    with pytest.raises(BlockError, match="7 bytes end in a token of 3"):
        chain(root_key(None), bytes(7), 1)
    with pytest.raises(BlockError, match="7 bytes end in a token of 3"):
        unpack_tokens(bytes(7))
