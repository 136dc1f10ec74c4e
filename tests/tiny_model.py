"""A random-weight Llama that engines load in seconds, with the default model's tokenizer.

Written with NumPy and safetensors alone: importing torch and transformers would take longer
than the rest.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class TinySpec:
    """The model's shape. 512 B of KV a token and layer in fp32, at these defaults."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 49_152  # the SmolLM2 tokenizer's
    max_position: int = 8_192
    seed: int = 7
    # At transformers' 0.02 the layers add little to the embedding, and greedy output repeats one
    # token. At 0.2 attention is peaked and decides the next token, so a wrong KV page shows.
    std: float = 0.2

    def key(self) -> str:
        """Names the cached folder; this file's text is in it, so an edit makes a new one."""
        text = json.dumps(asdict(self), sort_keys=True).encode() + Path(__file__).read_bytes()
        return hashlib.sha256(text).hexdigest()[:12]


def cached_tiny_model(cache_dir: Path, tokenizer_dir: Path, spec: TinySpec | None = None) -> Path:
    """Return the folder under `cache_dir` for `spec`, writing it first if there is none."""
    spec = spec or TinySpec()
    target = cache_dir / "models" / f"tiny-{spec.key()}"
    if not target.exists():
        # Of two processes that write at once, the last to rename finds the same bytes there.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write_tiny_model(partial, tokenizer_dir, spec)
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def write_tiny_model(path: Path, tokenizer_dir: Path, spec: TinySpec | None = None) -> None:
    """Write weights, config and the tokenizer of `tokenizer_dir` as a Hugging Face folder."""
    spec = spec or TinySpec()
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(_config(spec), indent=2))
    save_file(dict(_weights(spec)), path / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, path / name)


def _config(spec: TinySpec) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        # Tied, the likeliest next token would be the current one.
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _weights(spec: TinySpec) -> Iterator[tuple[str, NDArray[np.float32]]]:
    random = np.random.default_rng(spec.seed)

    def normal(rows: int, columns: int) -> NDArray[np.float32]:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(spec.std)

    ones = np.ones(spec.hidden, dtype=np.float32)
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", normal(spec.vocab, spec.hidden)
    for number in range(spec.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", ones
        yield f"{layer}.self_attn.q_proj.weight", normal(queries, spec.hidden)
        yield f"{layer}.self_attn.k_proj.weight", normal(keys, spec.hidden)
        yield f"{layer}.self_attn.v_proj.weight", normal(keys, spec.hidden)
        yield f"{layer}.self_attn.o_proj.weight", normal(spec.hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", ones
        yield f"{layer}.mlp.gate_proj.weight", normal(2 * spec.hidden, spec.hidden)
        yield f"{layer}.mlp.up_proj.weight", normal(2 * spec.hidden, spec.hidden)
        yield f"{layer}.mlp.down_proj.weight", normal(spec.hidden, 2 * spec.hidden)
    yield "model.norm.weight", ones
    yield "lm_head.weight", normal(spec.vocab, spec.hidden)
