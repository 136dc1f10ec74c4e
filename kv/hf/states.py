"""The fixed state of linear attention and mamba layers, read from a config.

The shapes are those of vLLM 0.32 (`MambaStateShapeCalculator`), without speculative tokens.
"""

from dataclasses import dataclass

from kv.geometry import StatePart
from kv.hf.fields import Fields


@dataclass(frozen=True, slots=True)
class Elements:
    """Bytes of an element: of keys and values, of a convolution's state, of a recurrent state."""

    kv: int
    convolution: int
    recurrent: int


def gated_delta_net(fields: Fields, elements: Elements) -> tuple[StatePart, ...]:
    """Qwen's: the convolution's last inputs, and a matrix of key by value a value head."""
    kept = fields.count("linear_conv_kernel_dim") - 1
    key_heads, value_heads = (fields.count(f"linear_num_{x}_heads") for x in ("key", "value"))
    key_dim, value_dim = (fields.count(f"linear_{x}_head_dim") for x in ("key", "value"))
    return (
        StatePart(key_heads, 2 * key_dim * kept, elements.convolution),
        StatePart(value_heads, value_dim * kept, elements.convolution),
        StatePart(value_heads, value_dim * key_dim, elements.recurrent),
    )


def mamba2(fields: Fields, elements: Elements) -> tuple[StatePart, ...]:
    """The convolution's last inputs of heads and groups, and each head's state."""
    heads = fields.count("mamba_n_heads", "mamba_num_heads")
    if fields.text("mamba_d_head") == "auto":
        head_dim = fields.count("mamba_expand") * fields.count("hidden_size") // heads
    else:
        head_dim = fields.count("mamba_d_head", "mamba_head_dim")
    state = fields.count("mamba_d_state", "ssm_state_size")
    kept = fields.count("mamba_d_conv", "conv_kernel") - 1
    groups = fields.count("mamba_n_groups", "n_groups")
    return (
        StatePart(heads, head_dim * kept, elements.convolution),
        StatePart(groups, 2 * state * kept, elements.convolution, replicate=True),
        StatePart(heads, head_dim * state, elements.recurrent),
    )


def mamba1(fields: Fields, elements: Elements) -> tuple[StatePart, ...]:
    """Jamba's: a convolution and a state of each channel."""
    channels = fields.count("mamba_expand") * fields.count("hidden_size")
    return (
        StatePart(channels, fields.count("mamba_d_conv") - 1, elements.convolution),
        StatePart(channels, fields.count("mamba_d_state"), elements.recurrent),
    )
