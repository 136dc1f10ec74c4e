"""KV geometry out of configs: published models, odd ones, and hostile ones."""

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.home import ROOT
from kv.errors import SizeError
from kv.geometry import FullAttention, SlidingAttention, State
from kv.hf.architectures import known
from kv.hf.config import read
from kv.hf.fields import MAX_COUNT, MAX_LAYERS
from tests import known_configs as configs
from tests.known_configs import Config

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("LLAMA_2_7B", 512),
        ("LLAMA_3_1_8B", 128),
        ("LLAMA_3_1_70B", 320),
        ("QWEN3_1_7B", 112),
        ("QWEN3_4B", 144),
        ("QWEN3_8B", 144),
        ("QWEN3_30B_A3B", 96),
        ("QWEN2_5_7B", 56),
        ("FALCON_7B", 8),
        ("SMOLLM2_135M", 22.5),
        ("DEEPSEEK_V3", 68.625),
        ("QWEN3_5_35B_A3B", 20),
    ],
)
def test_known_models_have_their_known_size(name: str, kib: float) -> None:
    """bf16 sizes are those of FACTS.md, "Formulas"; no window cuts them off."""
    geometry = read(getattr(configs, name)).geometry
    assert geometry.bytes_per_token() == kib * KIB
    assert geometry.bytes_per_token_past_windows() == kib * KIB


def test_deepseek_v3_keeps_one_latent_vector() -> None:
    """61 layers of 512 + 64 values; quantised weights do not quantise it."""
    model = read(configs.DEEPSEEK_V3)
    assert (model.geometry.bytes_per_token(), model.kv_dtype) == (70_272, "bfloat16")


def test_qwen3_5_keeps_a_state_of_about_30_mib() -> None:
    """30 layers: a recurrent state of 1 MiB each in bf16, 48 KiB of convolution inputs."""
    geometry = read(configs.QWEN3_5_35B_A3B).geometry
    assert [group.layers for group in geometry.groups] == [10, 30]
    assert geometry.state_bytes() == 30 * (32 * 128 * 128 * 2 + 8192 * 3 * 2)
    assert geometry.state_bytes() / MIB == pytest.approx(30, rel=0.05)
    assert geometry.request_bytes(1000) == geometry.state_bytes() + 1000 * 20 * KIB


def test_a_recurrent_state_has_a_dtype_of_its_own() -> None:
    """Qwen3.5's `mamba_ssm_dtype` and the option; keys, values and convolution keep theirs."""
    text = {**configs.QWEN3_5_35B_A3B["text_config"], "mamba_ssm_dtype": "float32"}
    config = {**configs.QWEN3_5_35B_A3B, "text_config": text}
    wide, plain = read(config).geometry, read(configs.QWEN3_5_35B_A3B).geometry
    assert wide.state_bytes() - plain.state_bytes() == 30 * MIB
    assert wide.bytes_per_token() == plain.bytes_per_token()
    assert read(config, state_dtype="bf16").geometry == plain


@pytest.mark.parametrize(
    ("name", "full", "state_layers", "state_bytes"),
    [
        ("QWEN3_NEXT_80B_A3B", 12, 36, 32 * 128 * 128 * 2 + 8192 * 3 * 2),
        ("GRANITE_4_H_TINY", 4, 36, 48 * 64 * 128 * 2 + (48 * 64 + 2 * 128) * 3 * 2),
        ("JAMBA_V01", 4, 28, 8192 * 16 * 2 + 8192 * 3 * 2),
        ("NEMOTRON_H_8B", 4, 24, 128 * 64 * 128 * 4 + (128 * 64 + 2 * 8 * 128) * 3 * 2),
    ],
)
def test_hybrid_models_keep_states(
    name: str, full: int, state_layers: int, state_bytes: int
) -> None:
    """vLLM's shapes: recurrent state, and the convolution's last 3 inputs."""
    attention, state = read(getattr(configs, name)).geometry.groups
    assert isinstance(attention, FullAttention)
    assert isinstance(state, State)
    assert (attention.layers, state.layers) == (full, state_layers)
    assert state.state_bytes == state_layers * state_bytes


def test_nemotron_may_list_words_instead_of_letters() -> None:
    """As newer transformers save it, without `num_hidden_layers`."""
    words = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config = {**configs.NEMOTRON_H_8B}
    del config["num_hidden_layers"]
    listed = [words[letter] for letter in config.pop("hybrid_override_pattern")]
    with pytest.raises(SizeError, match="no hybrid_override_pattern"):
        read(config)
    config["layers_block_type"] = listed
    assert read(config).geometry == read(configs.NEMOTRON_H_8B).geometry


@pytest.mark.parametrize(
    ("name", "full", "sliding", "window"),
    [
        ("GEMMA_2_9B", 21, 21, 4096),
        ("GEMMA_3_1B", 4, 22, 512),
        ("GEMMA_3_4B", 5, 29, 1024),
        ("GPT_OSS_20B", 12, 12, 128),
    ],
)
def test_windows_alternate_with_full_attention(
    name: str, full: int, sliding: int, window: int
) -> None:
    """Every second or sixth layer sees everything."""
    whole, windowed = read(getattr(configs, name)).geometry.groups
    assert isinstance(windowed, SlidingAttention)
    assert (whole.layers, windowed.layers, windowed.window_tokens) == (full, sliding, window)


def test_gemma_3_stops_growing_in_most_layers() -> None:
    """26 KiB a token up to 512 tokens, 4 KiB behind."""
    geometry = read(configs.GEMMA_3_1B).geometry
    assert geometry.bytes_per_token() == 26 * KIB
    assert geometry.bytes_per_token_past_windows() == 4 * KIB
    assert geometry.request_bytes(8192) == 512 * 22 * KIB + 8192 * 4 * KIB


def test_one_window_may_be_every_layers() -> None:
    """Mistral 7B v0.1 keeps 4,096 tokens; v0.2, whose window is null, all."""
    first = read(configs.MISTRAL_7B_V01).geometry
    assert first.request_bytes(100_000) == first.request_bytes(4096) == 512 * MIB
    second = read({**configs.MISTRAL_7B_V01, "sliding_window": None}).geometry
    assert second.request_bytes(8192) == 1024 * MIB


@pytest.mark.parametrize(
    ("change", "full", "sliding"),
    [
        ({}, 28, 0),
        ({"use_sliding_window": True}, 28, 0),
        ({"use_sliding_window": True, "max_window_layers": 20}, 20, 8),
        ({"use_sliding_window": True, "sliding_window": None}, 28, 0),
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"] * 28}, 28, 0),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 25,
            },
            3,
            25,
        ),
    ],
)
def test_a_window_that_is_not_used_counts_for_nothing(
    change: Config, full: int, sliding: int
) -> None:
    """Qwen 2.5 states a window and a switch for it."""
    groups = read({**configs.QWEN2_5_7B, **change}).geometry.groups
    found = {type(group): group.layers for group in groups}
    assert found.get(FullAttention, 0) == full
    assert found.get(SlidingAttention, 0) == sliding


def test_a_pattern_of_letters_ends_with_full_attention() -> None:
    """EXAONE 4 writes LLLG; its last layer is G whatever the pattern says."""
    config = {**configs.LLAMA_3_1_8B, "model_type": "exaone4", "num_hidden_layers": 30}
    groups = read({**config, "sliding_window_pattern": "LLLG"}).geometry.groups
    assert [group.layers for group in groups] == [8, 22]


def test_falcon_40b_keeps_its_groups() -> None:
    """The new decoder architecture takes no notice of `multi_query`."""
    assert read(configs.FALCON_40B).geometry.bytes_per_token() == 2 * 60 * 8 * 64 * 2


@pytest.mark.parametrize("head_dim", [None, 0, "absent"])
def test_a_missing_head_dim_is_derived(head_dim: object) -> None:
    """Hidden size over heads, whatever stands for missing."""
    stated = {} if head_dim == "absent" else {"head_dim": head_dim}
    assert read({**configs.LLAMA_3_1_8B, **stated}).geometry.bytes_per_token() == 128 * KIB


def test_old_names_are_known() -> None:
    """GPT-2's n_layer, n_head and n_embd; GPT BigCode's one KV head."""
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}
    assert read(gpt2).geometry.bytes_per_token() == 2 * 12 * 12 * 64 * 2
    assert read({**gpt2, "model_type": "gpt_bigcode"}).geometry.bytes_per_token() == 2 * 12 * 64 * 2


@pytest.mark.parametrize(
    ("stated", "asked", "kv_dtype", "kib"),
    [
        ({}, None, "bfloat16", 128),
        ({"torch_dtype": None}, None, "bfloat16", 128),
        ({"torch_dtype": None, "dtype": "float32"}, None, "float32", 256),
        ({}, "float32", "float32", 256),
        ({}, "torch.float16", "float16", 128),
        ({}, "FP8", "fp8", 64),
        ({}, "fp8_e5m2", "fp8_e5m2", 64),
        ({"quantization_config": {"kv_cache_scheme": None}}, None, "bfloat16", 128),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
            None,
            "fp8",
            64,
        ),
        (
            {"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}},
            None,
            "fp8",
            64,
        ),
        ({"quantization_config": {"kv_cache_quant_algo": "FP8"}}, "bf16", "bfloat16", 128),
    ],
)
def test_the_dtype_is_the_options_or_the_configs(
    stated: Config, asked: str | None, kv_dtype: str, kib: int
) -> None:
    """Option, then the checkpoint's KV quantisation, then the model's dtype, then bf16."""
    model = read({**configs.LLAMA_3_1_8B, **stated}, dtype=asked)
    assert (model.kv_dtype, model.geometry.bytes_per_token()) == (kv_dtype, kib * KIB)


def test_fp8_leaves_states_alone() -> None:
    """vLLM quantises keys and values only."""
    plain, small = read(configs.QWEN3_5_35B_A3B), read(configs.QWEN3_5_35B_A3B, dtype="fp8")
    assert small.geometry.state_bytes() == plain.geometry.state_bytes()
    assert 2 * small.geometry.bytes_per_token() == plain.geometry.bytes_per_token()


@pytest.mark.parametrize(
    ("name", "ranks", "rank_bytes"),
    [
        ("LLAMA_3_1_8B", 8, 16 * KIB),
        ("LLAMA_3_1_8B", 16, 16 * KIB),
        ("FALCON_7B", 4, 8 * KIB),
        ("DEEPSEEK_V3", 8, 70_272),
        ("QWEN3_5_35B_A3B", 2, 10 * KIB),
    ],
)
def test_ranks_divide_heads_and_repeat_the_rest(name: str, ranks: int, rank_bytes: int) -> None:
    """One KV head a rank is the least; MLA is whole on each."""
    rank = read(getattr(configs, name)).geometry.on_rank(ranks)
    assert rank.bytes_per_token() == rank_bytes


def test_ranks_divide_states_but_repeat_groups() -> None:
    """Granite's one group of B and C goes to each rank, its 48 heads are divided."""
    whole, half = (read(configs.GRANITE_4_H_TINY).geometry.on_rank(n) for n in (1, 2))
    repeated = 36 * 2 * 128 * 3 * 2
    assert 2 * half.state_bytes() == whole.state_bytes() + repeated


@pytest.mark.parametrize("config", [[], "llama", 3, None, {}, {"model_type": 3}])
def test_what_is_no_config_is_refused(config: object) -> None:
    """Any JSON may be in the file."""
    with pytest.raises(SizeError, match="give a Hugging Face config"):
        read(config)


@pytest.mark.parametrize(
    "model_type", ["t5", "whisper", "llama4", "mamba", "deepseek_v4", "x" * 99]
)
def test_an_unknown_architecture_is_refused(model_type: str) -> None:
    """A guess could be wrong by any factor."""
    with pytest.raises(SizeError, match=f"model_type '{model_type[:40]}' is not known"):
        read({**configs.LLAMA_3_1_8B, "model_type": model_type})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers is 3.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": [1]}, "num_hidden_layers is a list"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, f"{MAX_LAYERS + 1} layers"),
        ({"num_hidden_layers": 10**5000}, "a number of 16610 bits"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": -8}, "num_key_value_heads is -8"),
        ({"num_attention_heads": {}}, "num_attention_heads is a dict"),
        ({"num_attention_heads": 31}, "hidden size 4096, 31 heads"),
        ({"hidden_size": MAX_COUNT + 1}, "hidden_size is"),
        ({"head_dim": -64}, "head_dim is -64"),
        ({"head_dim": float("nan")}, "head_dim is nan"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"layer_types": ["full_attention"]}, "1 layer_types, 32 layers"),
        ({"layer_types": ["chunked_attention"] * 32}, "'chunked_attention'"),
        ({"layer_types": ["mamba"] * 32}, "layers with a state"),
        ({"layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
        ({"layer_types": "full"}, "layer_types is 'full'"),
        ({"layer_types": [1]}, "layer_types is a list"),
        ({"multi_query": "yes"}, "multi_query is 'yes'"),
        ({"text_config": 3}, "text_config is no JSON object"),
        ({"text_config": {}}, "no num_hidden_layers"),
        ({"torch_dtype": "q4"}, "'q4' is not known"),
        ({"torch_dtype": "float8_e4m3fn"}, "fp8_e4m3 is not that of a model"),
        ({"quantization_config": "fp8"}, "quantization_config is no JSON object"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 4}}}, "is not fp8"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(change: Config, says: str) -> None:
    """One sentence: which key, what it says, what is wanted."""
    with pytest.raises(SizeError, match=re.escape(says)) as error:
        read({**configs.LLAMA_3_1_8B, **change})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("dtype", ["int4", "", "bfloat17", "x" * 1000])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    """So is fp8 for a state."""
    with pytest.raises(SizeError, match="is not known; give one of float32"):
        read(configs.LLAMA_3_1_8B, dtype=dtype)
    with pytest.raises(SizeError, match="not that of a model"):
        read(configs.QWEN3_5_35B_A3B, state_dtype="fp8")


models = [getattr(configs, name) for name in dir(configs) if name.isupper() and name[0] != "_"]
keys = sorted({key for model in models for key in (*model, *model.get("text_config", ()))})
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.integers(), st.floats(), st.text(max_size=9)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner),
)


@given(
    st.sampled_from(models),
    st.dictionaries(st.sampled_from(keys), values, max_size=3),
    st.sampled_from([None, *known()]),
)
def test_any_config_gives_a_size_or_a_reason(
    model: Config, change: dict[str, Any], model_type: str | None
) -> None:
    """Nothing but SizeError comes of JSON, and no size below one byte."""
    config = {**model, **change, **({"model_type": model_type} if model_type else {})}
    with contextlib.suppress(SizeError):
        assert read(config).geometry.request_bytes(1) > 0


def test_the_docs_list_every_known_architecture() -> None:
    """docs/operations.md is what the error refers to."""
    text = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in known() if f"`{name}`" not in text]
    assert not missing
