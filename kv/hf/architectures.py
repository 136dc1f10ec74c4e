"""What each known architecture keeps, by the `model_type` of its config.

A model type is listed when its layers are known to keep what its family says, as transformers 5.19
reads the config and vLLM 0.32 lays out the cache. Any other is refused: a wrong size is worse than
none. Defaults are transformers' own, where configs on the hub leave a value out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kv.errors import SizeError
from kv.geometry import (
    FullAttention,
    Geometry,
    LatentAttention,
    LayerGroup,
    SlidingAttention,
    State,
    StatePart,
)
from kv.hf import layers, states
from kv.hf.fields import SUBJECT, Fields
from kv.hf.layers import Layers
from kv.hf.states import Elements


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's config is read. `latent` is MLA; a config's `sliding_window` is
    `window_extra` tokens short of what is kept; its `state_dtype_key` names the dtype of recurrent
    states, where that is not the model's."""

    layers: Callable[[Fields], Layers] = layers.uniform
    state: Callable[[Fields, Elements], tuple[StatePart, ...]] | None = None
    state_dtype_key: str | None = None
    latent: bool = False
    window_extra: int = 0
    defaults: Mapping[str, object] = field(default_factory=dict)

    def fields(self, config: Mapping[str, object]) -> Fields:
        """The config over this family's defaults."""
        return Fields(config, self.defaults)

    def geometry(self, fields: Fields, elements: Elements) -> Geometry:
        """The groups of layers. Raises SizeError for what is absent or makes no sense."""
        return Geometry(tuple(self._groups(fields, self.layers(fields), elements)))

    def _groups(self, fields: Fields, found: Layers, elements: Elements) -> Iterator[LayerGroup]:
        if found.full and self.latent:
            latent_dim = fields.count("kv_lora_rank") + fields.count("qk_rope_head_dim")
            yield LatentAttention(found.full, latent_dim, elements.kv)
        elif found.full:
            yield FullAttention(found.full, _kv_heads(fields), _head_dim(fields), elements.kv)
        if found.sliding:
            window = fields.count("sliding_window") + self.window_extra
            heads, dim = _kv_heads(fields), _head_dim(fields)
            yield SlidingAttention(found.sliding, heads, dim, elements.kv, window)
        if found.state:
            if self.state is None:
                raise SizeError(SUBJECT, "layers with a state", "its size is not known")
            yield State(found.state, self.state(fields, elements))


def family(model_type: str) -> Family:
    """The family of a model type. Raises SizeError for one that is not listed."""
    found = _FAMILIES.get(model_type)
    if found is None:
        raise SizeError(
            SUBJECT,
            f"model_type {model_type[:40]!r} is not known",
            "its layers may keep something else; docs/operations.md lists the known ones",
        )
    return found


def known() -> list[str]:
    """All model types, in alphabetical order."""
    return sorted(_FAMILIES)


def _kv_heads(fields: Fields) -> int:
    """As many as query heads unless a name of theirs or `multi_query` says otherwise."""
    if fields.flag("multi_query") and not fields.flag("new_decoder_architecture"):
        return 1
    stated = fields.optional(
        "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"
    )
    return stated or _heads(fields)


def _heads(fields: Fields) -> int:
    return fields.count("num_attention_heads", "n_head", "n_heads")


def _head_dim(fields: Fields) -> int:
    """Stated, or the hidden size over the query heads."""
    stated = fields.zero_or("head_dim") or fields.zero_or("kv_channels")
    if stated:
        return stated
    hidden, heads = fields.count("hidden_size", "n_embd", "d_model"), _heads(fields)
    if hidden % heads:
        raise SizeError(SUBJECT, f"hidden size {hidden}, {heads} heads", "give head_dim")
    return hidden // heads


_FAMILIES: dict[str, Family] = {}


def _list(model_types: str, its: Family) -> None:
    _FAMILIES.update(dict.fromkeys(model_types.split(), its))


# Keys and values in every layer; one window for all of them, if any.
_list(
    "llama mixtral phi phi3 phimoe starcoder2 stablelm gpt2 gptj gpt_neox bloom opt falcon "
    "olmo olmo2 olmoe granite granitemoe granitemoeshared nemotron apertus arcee cohere chatglm "
    "internlm2 hunyuan_v1_dense hunyuan_v1_moe",
    Family(),
)
_list("gpt_bigcode", Family(defaults={"multi_query": True}))
_list("mistral ministral", Family(defaults={"sliding_window": 4096}))
_list("gemma", Family(defaults={"head_dim": 256}))
_list("glm glm4 seed_oss helium", Family(defaults={"head_dim": 128}))
_list("glm4_moe minimax_m2 ernie4_5 ernie4_5_moe", Family())
_SWITCHED = {"sliding_window": 4096, "max_window_layers": 28}
_list(
    "qwen2 qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text",
    Family(layers.switched, defaults=_SWITCHED),
)
_list(
    "qwen3 qwen3_vl_text",
    Family(layers.switched, defaults={**_SWITCHED, "head_dim": 128}),
)
_list("qwen2_moe qwen3_moe qwen3_vl_moe_text smollm3", Family(layers.unwindowed))

# Windows in most layers.
_GEMMA = {"head_dim": 256, "sliding_window": 4096}
_list("gemma2", Family(layers.every_nth_full, defaults={**_GEMMA, "sliding_window_pattern": 2}))
_list(
    "gemma3 gemma3_text",
    # The smallest multimodal Gemma 3 states neither its heads nor its pattern.
    Family(
        layers.every_nth_full,
        defaults={
            **_GEMMA,
            "sliding_window_pattern": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
)
_list(
    "gpt_oss",
    Family(
        layers.every_nth_full,
        defaults={"head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    ),
)
_FOUR = {"sliding_window": 4096, "sliding_window_pattern": 4}
_list("exaone4 olmo3", Family(layers.every_nth_full, defaults=_FOUR))
# A token sees as many others as its window, and itself (vLLM's commandr.py).
_list("cohere2", Family(layers.every_nth_full, defaults=_FOUR, window_extra=1))

# MLA.
_list("deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite", Family(latent=True))

# Linear attention or mamba beside attention.
_DELTA = {"full_attention_interval": 4, "head_dim": 256}
_list(
    "qwen3_next",
    Family(layers.every_nth_attends, states.gated_delta_net, defaults=_DELTA),
)
_list(
    "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    Family(layers.every_nth_attends, states.gated_delta_net, "mamba_ssm_dtype", defaults=_DELTA),
)
_list("jamba", Family(layers.jamba, states.mamba1))
_list(
    "granitemoehybrid",
    Family(layers.granite_hybrid, states.mamba2, defaults={"mamba_d_head": "auto"}),
)
_list(
    "nemotron_h",
    Family(
        layers.nemotron_h,
        states.mamba2,
        "mamba_ssm_cache_dtype",
        defaults={"head_dim": 128, "mamba_ssm_cache_dtype": "float32"},
    ),
)
