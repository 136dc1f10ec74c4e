"""Which vault shard a key belongs to: rendezvous hashing.

Each shard draws a score from the key and its own name, the same in every process, and the highest
wins; so a shard that leaves gives away only what it had, and one that joins takes only what it wins
(D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998). A weighted
shard wins in proportion to its weight: its score is -w / ln(u), u uniform in (0, 1).

Keys of one prompt that are to be found by one question, and evicted leaves first, must be placed
by one key, for instance that of their run's first block.
"""

from collections.abc import Mapping
from math import inf, isfinite, log

from xxhash import xxh3_64_intdigest

from kv.errors import VaultError

_SPAN = 1 << 53


def place(key: bytes, weights: Mapping[str, float]) -> str:
    """The shard of `key`, by shard name and weight. Raises VaultError as `ranked` does."""
    return ranked(key, weights)[0]


def ranked(key: bytes, weights: Mapping[str, float]) -> list[str]:
    """All shards in the order in which `key` would go to them as those before are gone.

    Raises VaultError for no shards, or for a weight that is not finite or not above 0.
    """
    wrong = [name for name, weight in weights.items() if not (isfinite(weight) and weight > 0.0)]
    if wrong or not weights:
        raise VaultError(
            f"placement on {len(weights)} shards",
            ", ".join(f"{name}: weight {weights[name]}" for name in wrong) or "nothing to choose",
            "give at least one shard, each with a finite weight above 0",
        )
    # By name where scores are alike, so that the order of the mapping never matters.
    return sorted(weights, key=lambda name: (-_score(key, name, weights[name]), name))


def _score(key: bytes, name: str, weight: float) -> float:
    named = name.encode()
    drawn = xxh3_64_intdigest(len(named).to_bytes(4, "big") + named + key)
    uniform = ((drawn >> 11) + 0.5) / _SPAN
    # The largest draws round to 1, where the logarithm is 0.
    return inf if uniform >= 1.0 else -weight / log(uniform)
