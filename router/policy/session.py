"""Which replica the turns of one session keep to, where several cost about the same.

Rendezvous hashing: each name gets a number from the session's key, and the highest wins. Without
any state every ingress answers alike, and a replica that leaves moves its own sessions only.
"""

from collections.abc import Iterable

from xxhash import xxh3_64_intdigest, xxh3_128_digest


def affinity(tenant: str, cache_key: str | None) -> bytes | None:
    """What stands for a tenant's `prompt_cache_key`, 16 bytes; None without one.

    The hash is fast, not secret: two sessions that share it only share a preference.
    """
    if cache_key is None:
        return None
    # Keys come from JSON, which can carry lone surrogates.
    named = f"{len(tenant)}:{tenant}{cache_key}".encode("utf-8", "surrogatepass")
    return xxh3_128_digest(named)


def preferred(session: bytes, names: Iterable[str]) -> str:
    """The name among at least one that this session keeps to."""
    return max(names, key=lambda name: (xxh3_64_intdigest(session + name.encode()), name))
