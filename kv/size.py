"""How many bytes of KV a token takes."""

from kv.errors import SizeError


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of keys and values of one token, over all layers, for plain multi-head or grouped-query
    attention (FACTS.md, "Formulas"). Raises SizeError unless every factor is at least 1.
    """
    if min(layers, kv_heads, head_dim, dtype_bytes) < 1:
        raise SizeError(
            "KV per token",
            f"layers={layers} kv_heads={kv_heads} head_dim={head_dim} dtype_bytes={dtype_bytes}",
            "give each from the model's config, at least 1",
        )
    return 2 * layers * kv_heads * head_dim * dtype_bytes
