"""Random-weight models of kinds other than `tests.tiny_model`: sliding windows, latent attention,
recurrent states. Run as a program: `kind_model.py CONFIG.json FOLDER` writes one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# As in `tests.tiny_model`: attention decides the next token, so a wrong page shows.
STD = 0.2
COMMON = {
    "vocab_size": 49_152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# The sliding layers make a group of two and one of one: rows of unequal length.
SLIDING = {
    **COMMON,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "float32",
    "num_hidden_layers": 5,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")
    ],
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
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


def kind_model(folder: Path, config: dict[str, Any]) -> Path:
    """Write a model of this config, in a process of its own: transformers takes seconds and memory
    that a test run need not keep."""
    folder.mkdir()
    given = folder / "given.json"
    given.write_text(json.dumps(config))
    subprocess.run([sys.executable, __file__, str(given), str(folder)], check=True, timeout=300)
    given.unlink()
    return folder


def main() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    options = {name: each for name, each in given.items() if name not in ("model_type", "dtype")}
    config = AutoConfig.for_model(given["model_type"], **options)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=STD)
    model.to(getattr(torch, given["dtype"])).save_pretrained(folder)


if __name__ == "__main__":
    main()
