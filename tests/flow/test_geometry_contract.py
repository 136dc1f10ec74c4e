"""What `kv.hf` knows of architectures is what the pinned transformers and vLLM make of them."""

import json
from collections import Counter
from math import prod
from typing import Any

import pytest

# First: it takes part in an import cycle.
import vllm.config  # isort: skip  # noqa: F401
from transformers import CONFIG_MAPPING
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from kv.geometry import FullAttention, LatentAttention, SlidingAttention, State
from kv.hf.architectures import known
from kv.hf.config import read
from tests import known_configs as configs

# Models of vLLM's own, or of code that comes with them.
FOREIGN = {"chatglm", "internlm2", "kimi_k2"}
# Whose default config is of no model: 96 heads do not divide its hidden size.
ODD = {"glm4_moe"}
# vLLM's model files know better than its convertor: one KV head, one token more, no stated heads.
ONE_HEAD, ONE_MORE, UNSTATED = "falcon", "cohere2", "nemotron"


@pytest.mark.parametrize("model_type", sorted(set(known()) - FOREIGN - ODD))
def test_a_default_config_is_read_as_vllm_reads_it(model_type: str) -> None:
    """Layers of each kind, KV heads, head size and window of what transformers makes by default."""
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    theirs = ModelArchConfigConvertorBase(config, text)
    written = json.loads(json.dumps(config.to_dict(), default=str))
    ours = read(written).geometry.groups
    assert Counter({_kind(group): group.layers for group in ours}) == _kinds(text)
    for group in ours:
        if isinstance(group, LatentAttention):
            assert group.latent_dim == theirs.get_head_size()
        elif isinstance(group, FullAttention | SlidingAttention):
            assert group.head_dim == theirs.get_head_size()
            if model_type not in (ONE_HEAD, UNSTATED):
                assert group.kv_heads == theirs.get_total_num_kv_heads()
        if isinstance(group, SlidingAttention):
            assert group.window_tokens == text.sliding_window + (model_type == ONE_MORE)


def _kind(group: object) -> str:
    if isinstance(group, SlidingAttention):
        return "sliding_attention"
    return "linear_attention" if isinstance(group, State) else "full_attention"


def _kinds(text: Any) -> Counter[str]:
    """How many layers of each kind keep something."""
    if listed := getattr(text, "layer_types", None):
        return Counter(kind for kind in listed if kind not in ("mlp", "moe"))
    windowed = getattr(text, "sliding_window", None)
    kind = "sliding_attention" if windowed else "full_attention"
    return Counter({kind: text.num_hidden_layers})


def _bytes(shapes: tuple[tuple[int, ...], ...], *element_bytes: int) -> int:
    return sum(prod(shape) * size for shape, size in zip(shapes, element_bytes, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_states_have_vllms_shapes(ranks: int) -> None:
    """Gated DeltaNet, mamba 1 and mamba 2, divided among ranks as vLLM divides them."""
    mamba2 = {"head_dim": 64, "state_size": 128, "conv_kernel": 4}
    theirs = {
        "QWEN3_5_35B_A3B": _bytes(
            Shapes.gated_delta_net_state_shape(ranks, 16, 32, 128, 128, 4), 2, 2
        ),
        "JAMBA_V01": _bytes(Shapes.mamba1_state_shape(ranks, 8192, 16, 4), 2, 2),
        "GRANITE_4_H_TINY": _bytes(
            Shapes.mamba2_state_shape(ranks, 48 * 64, n_groups=1, num_heads=48, **mamba2), 2, 2
        ),
        "NEMOTRON_H_8B": _bytes(
            Shapes.mamba2_state_shape(ranks, 128 * 64, n_groups=8, num_heads=128, **mamba2), 2, 4
        ),
    }
    for name, layer_bytes in theirs.items():
        _, state = read(getattr(configs, name)).geometry.groups
        assert state.on_rank(ranks).state_bytes == state.layers * layer_bytes, name
