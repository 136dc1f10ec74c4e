"""Minimal configs of published models: what their KV depends on, and the dtype."""

from typing import Any

Config = dict[str, Any]


def _config(model_type: str, layers: int, heads: int, hidden: int, **more: Any) -> Config:
    return {
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        **more,
    }


LLAMA_2_7B = _config("llama", 32, 32, 4096, torch_dtype="float16")
LLAMA_3_1_8B = _config("llama", 32, 32, 4096, num_key_value_heads=8)
LLAMA_3_1_70B = _config("llama", 80, 64, 8192, num_key_value_heads=8)
QWEN3_1_7B = _config("qwen3", 28, 16, 2048, num_key_value_heads=8, head_dim=128)
QWEN3_4B = _config(
    "qwen3",
    36,
    32,
    2560,
    num_key_value_heads=8,
    head_dim=128,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=36,
)
QWEN3_8B = _config("qwen3", 36, 32, 4096, num_key_value_heads=8, head_dim=128)
QWEN3_30B_A3B = _config("qwen3_moe", 48, 32, 2048, num_key_value_heads=4, head_dim=128)
# Its window is stated and not used.
QWEN2_5_7B = _config(
    "qwen2",
    28,
    28,
    3584,
    num_key_value_heads=4,
    sliding_window=131_072,
    use_sliding_window=False,
    max_window_layers=28,
)
# 71 KV heads are stated, one is kept.
FALCON_7B = _config("falcon", 32, 71, 4544, multi_query=True, num_kv_heads=71)
FALCON_40B = _config(
    "falcon", 60, 128, 8192, num_kv_heads=8, multi_query=True, new_decoder_architecture=True
)
SMOLLM2_135M = _config("llama", 30, 9, 576, num_key_value_heads=3)
MISTRAL_7B_V01 = _config("mistral", 32, 32, 4096, num_key_value_heads=8, sliding_window=4096)
DEEPSEEK_V3 = _config(
    "deepseek_v3",
    61,
    128,
    7168,
    num_key_value_heads=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    # Of weights alone: keys and values stay in bf16.
    quantization_config={"quant_method": "fp8", "fmt": "e4m3"},
)
GEMMA_2_9B = _config(
    "gemma2", 42, 16, 3584, num_key_value_heads=8, head_dim=256, sliding_window=4096
)
GEMMA_3_1B = _config(
    "gemma3_text",
    26,
    4,
    1152,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
    sliding_window_pattern=6,
)
# As published: heads and pattern are left to the defaults.
GEMMA_3_4B: Config = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
GPT_OSS_20B = _config(
    "gpt_oss",
    24,
    64,
    2880,
    num_key_value_heads=8,
    head_dim=64,
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 12,
)
_DELTA_NET = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
QWEN3_5_35B_A3B: Config = {
    "model_type": "qwen3_5_moe",
    "text_config": _config(
        "qwen3_5_moe_text",
        40,
        16,
        2048,
        num_key_value_heads=2,
        head_dim=256,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10,
        **_DELTA_NET,
    ),
}
QWEN3_NEXT_80B_A3B = _config(
    "qwen3_next",
    48,
    16,
    2048,
    num_key_value_heads=2,
    head_dim=256,
    full_attention_interval=4,
    **_DELTA_NET,
)
GRANITE_4_H_TINY = _config(
    "granitemoehybrid",
    40,
    12,
    1536,
    num_key_value_heads=4,
    layer_types=(["mamba"] * 9 + ["attention"]) * 4,
    mamba_n_heads=48,
    mamba_d_head=64,
    mamba_d_state=128,
    mamba_d_conv=4,
    mamba_n_groups=1,
    mamba_expand=2,
)
JAMBA_V01 = _config(
    "jamba",
    32,
    32,
    4096,
    num_key_value_heads=8,
    attn_layer_period=8,
    attn_layer_offset=4,
    mamba_expand=2,
    mamba_d_state=16,
    mamba_d_conv=4,
)
NEMOTRON_H_8B = _config(
    "nemotron_h",
    52,
    32,
    4096,
    num_key_value_heads=8,
    head_dim=128,
    hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    mamba_num_heads=128,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
)
