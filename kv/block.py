"""Catalogue keys: a salted chain of xxh3_128 digests over fixed runs of prompt tokens.

Engines and tiers name blocks by vLLM's sha256_cbor; at 14 us a block in Python that is too slow for
the request path, so the catalogue has names of its own. xxh3_128 is fast, not collision resistant:
two different prefixes can be made to share a key. Such a collision can only misroute a request to
a replica that lacks its blocks; no KV is ever read by these keys. The salt keeps tenants apart.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import SupportsIndex

from xxhash import xxh3_128_digest

from kv.errors import BlockError

TOKEN_BYTES = 4
KEY_BYTES = 16
MAX_TOKEN_ID = 2**32 - 1
# C's unsigned int, 4 bytes wherever CPython runs.
_UINT32 = "I"


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """`len(token_ids)` ids as uint32, little-endian on every machine: 4 bytes each.

    Raises BlockError for anything but an integer in [0, 2**32).
    """
    try:
        # Half the time of struct.pack: 15 against 26 us for 4,096 tokens. From anything but a list
        # an array may take raw bytes.
        packed = array(_UINT32, token_ids if isinstance(token_ids, list) else list(token_ids))
    except (TypeError, OverflowError) as error:
        raise _refusal(token_ids) from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed_tokens: bytes) -> list[int]:
    """The token ids that `pack_tokens` packed. Raises BlockError for a torn last token."""
    return list(struct.unpack(f"<{_count(packed_tokens)}I", packed_tokens))


def root_key(salt: str | None) -> bytes:
    """The 16-byte parent of a first block. No salt and an empty salt are different namespaces."""
    # Salts come from JSON, which can carry lone surrogates.
    named = b"\x00" if salt is None else b"\x01" + salt.encode("utf-8", "surrogatepass")
    return xxh3_128_digest(named)


def chain(root: bytes, packed_tokens: bytes, block_tokens: int) -> list[bytes]:
    """Keys, 16 bytes each, of the full blocks of a prompt; key i names blocks 0 to i together.

    `packed_tokens` is `pack_tokens`'s uint32 bytes. A last block that is not full has no key.
    Raises BlockError for a block of no tokens or a torn last token.
    """
    if block_tokens < 1:
        raise BlockError("chain", f"block_tokens is {block_tokens}", "give at least 1")
    width_bytes = block_tokens * TOKEN_BYTES
    full_bytes = _count(packed_tokens) // block_tokens * width_bytes
    blocks = struct.iter_unpack(f"{width_bytes}s", memoryview(packed_tokens)[:full_bytes])
    key = root
    return [key := xxh3_128_digest(key + block) for (block,) in blocks]


def split_keys(keys: bytes) -> list[bytes]:
    """Concatenated keys, apart again."""
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _count(packed_tokens: bytes) -> int:
    n_tokens, torn_bytes = divmod(len(packed_tokens), TOKEN_BYTES)
    if torn_bytes:
        raise BlockError(
            "packed tokens",
            f"{len(packed_tokens)} bytes end in a token of {torn_bytes} bytes",
            f"give {TOKEN_BYTES} bytes a token, as pack_tokens does",
        )
    return n_tokens


def _refusal(token_ids: Sequence[int]) -> BlockError:
    position = next(i for i, token_id in enumerate(token_ids) if not _fits(token_id))
    return BlockError(
        f"token {position}",
        f"{token_ids[position]!r} is not an integer from 0 to {MAX_TOKEN_ID}",
        "give the ids of the model's own tokenizer",
    )


def _fits(token_id: object) -> bool:
    return isinstance(token_id, SupportsIndex) and 0 <= token_id.__index__() <= MAX_TOKEN_ID
