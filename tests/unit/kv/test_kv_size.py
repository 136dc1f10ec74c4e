import pytest

from kv.errors import SizeError
from kv.size import kv_bytes_per_token

BF16 = 2
FP32 = 4


@pytest.mark.parametrize(
    ("model", "layers", "kv_heads", "head_dim", "kib"),
    [
        ("Llama-2-7B", 32, 32, 128, 512),
        ("Llama-3.1-8B", 32, 8, 128, 128),
        ("Llama-3.1-70B", 80, 8, 128, 320),
        ("Qwen3-1.7B", 28, 8, 128, 112),
        ("Qwen3-4B", 36, 8, 128, 144),
        ("Qwen3-30B-A3B", 48, 4, 128, 96),
        ("Qwen2.5-7B", 28, 4, 128, 56),
        ("Falcon-7B", 32, 1, 64, 8),
        ("SmolLM2-135M", 30, 3, 64, 22.5),
    ],
)
def test_known_models_have_their_known_size(
    model: str, layers: int, kv_heads: int, head_dim: int, kib: float
) -> None:
    """bf16 sizes are those of FACTS.md, "Formulas"."""
    assert kv_bytes_per_token(layers, kv_heads, head_dim, BF16) == kib * 1024, model


def test_fp32_takes_twice_the_bytes_of_bf16() -> None:
    """SmolLM2-135M takes 45 KiB a token in fp32."""
    assert kv_bytes_per_token(30, 3, 64, FP32) == 45 * 1024


@pytest.mark.parametrize(
    "shape", [(0, 8, 128, 2), (32, 0, 128, 2), (32, 8, -1, 2), (32, 8, 128, 0)]
)
def test_a_factor_that_was_not_read_is_refused(shape: tuple[int, int, int, int]) -> None:
    """A size of zero would make every transfer look free."""
    with pytest.raises(SizeError, match=f"layers={shape[0]} kv_heads={shape[1]}"):
        kv_bytes_per_token(*shape)
