"""The geometry that is read from a config is what vLLM allocates for the model."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from kv.hf.config import read
from tests.flow.laid_out import run, shape

BLOCK_TOKENS = 32
NO_WEIGHTS = {"load_format": "dummy", "skip_tokenizer_init": True}
COMMON = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SLIDING = {
    **COMMON,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "float32",
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 128,
}
LATENT = {
    **COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "dtype": "float32",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
}
HYBRID = {
    **COMMON,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


@pytest.mark.real_model
def test_a_llamas_geometry_is_what_vllm_allocates(tiny_model: Path) -> None:
    """Group by group, and the bytes of all pages by all tokens that they have room for."""
    config = json.loads((tiny_model / "config.json").read_text())
    geometry = read(config).geometry
    found = run(tiny_model, {})
    assert found["groups"] == shape(geometry)
    assert found["bytes_per_token"] == geometry.bytes_per_token()
    assert found["allocated_bytes"] == found["blocks"] * geometry.block_bytes(BLOCK_TOKENS)


@pytest.mark.parametrize("config", [SLIDING, LATENT], ids=["sliding", "latent"])
def test_a_models_geometry_is_what_vllm_allocates(config: dict[str, Any], tmp_path: Path) -> None:
    """Windows and latent vectors, on random weights."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    geometry = read(config).geometry
    found = run(tmp_path, NO_WEIGHTS)
    assert _merged(found["groups"]) == _merged(shape(geometry))
    assert found["bytes_per_token"] == geometry.bytes_per_token()


def test_a_hybrid_models_states_fill_the_page_that_vllm_pads(tmp_path: Path) -> None:
    """vLLM makes the pages of attention and of states equally long: a layer's state is padded to
    whole runs of 32 tokens of a layer's attention. On CPUs it keeps recurrent states in float32."""
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    geometry = read(HYBRID, state_dtype="float32").geometry
    found = run(tmp_path, {**NO_WEIGHTS, "dtype": "bfloat16"})
    attention, state = (_merged(found["groups"])[has_state] for has_state in (False, True))
    assert attention[:2] == [1, geometry.bytes_per_token()]
    assert found["bytes_per_token"] == geometry.bytes_per_token()
    run_bytes = BLOCK_TOKENS * geometry.bytes_per_token()
    assert state[0] == 3
    assert state[3] == 3 * ceil(geometry.state_bytes() / 3 / run_bytes) * run_bytes


def _merged(groups: list[list[Any]]) -> dict[Any, list[Any]]:
    """One row a window, or for all states; vLLM cuts kinds into groups of equal length."""
    rows: dict[Any, list[Any]] = {}
    for layers, token_bytes, window, state_bytes in groups:
        key = window if window is not None else bool(state_bytes)
        row = rows.setdefault(key, [0, 0, window, 0])
        row[0], row[1], row[3] = row[0] + layers, row[1] + token_bytes, row[3] + state_bytes
    return rows
