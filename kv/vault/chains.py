"""Where a request's blocks lie in a vault: which run each belongs to, and which block is before it.

A run is RUN_BLOCKS of one KV cache group, named by its first block. It lies on one shard, so that
one question finds it and its tail leaves before its head (`kv.placement`). All prompts that share
a run's first block find each other there, whatever comes behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

# 1,024 to 2,048 tokens at usual block sizes: long enough for a question to pay, short enough that
# a long prompt spreads over the shards.
RUN_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Spot:
    """A block's run, the block before it (None for a prompt's first), its tokens [start, end)."""

    run: bytes
    parent: bytes | None
    start_token: int
    end_token: int


class Chains:
    """The blocks of one request in order, by KV cache group.

    `block_tokens` are tokens of a block by group; `group_of` tells a key's group.
    """

    def __init__(self, block_tokens: Mapping[int, int]) -> None:
        self._block_tokens = block_tokens
        self._keys: dict[int, list[bytes]] = {group: [] for group in block_tokens}
        self._seen = 0

    def __len__(self) -> int:
        return sum(map(len, self._keys.values()))

    def extend(self, end_tokens: Mapping[bytes, int]) -> None:
        """Take in what was added to `end_tokens` since the last call: each key, in the order of
        its group, with the token behind its block. It only grows."""
        for key, end_token in islice(end_tokens.items(), self._seen, None):
            chain = self._keys[group_of(key)]
            # A part of a block, which vLLM may name at a prompt's end, has none behind it.
            if end_token == (len(chain) + 1) * self._block_tokens[group_of(key)]:
                chain.append(key)
        self._seen = len(end_tokens)

    def spot(self, key: bytes, end_token: int) -> Spot:
        """Where a block lies that ends before `end_token`."""
        chain, tokens = self._keys[group_of(key)], self._block_tokens[group_of(key)]
        index = (end_token - 1) // tokens
        first = index - index % RUN_BLOCKS
        return Spot(
            run=chain[first] if first < len(chain) else key,
            parent=chain[index - 1] if 0 < index <= len(chain) else None,
            start_token=index * tokens,
            end_token=end_token,
        )

    def runs(self) -> dict[bytes, list[bytes]]:
        """Every whole block, by its run, in order."""
        return {
            chain[first]: chain[first : first + RUN_BLOCKS]
            for chain in self._keys.values()
            for first in range(0, len(chain), RUN_BLOCKS)
        }


def group_of(key: bytes) -> int:
    """The KV cache group of a block: the last four bytes of what vLLM's tiers call it."""
    return int.from_bytes(key[-4:], "big")
