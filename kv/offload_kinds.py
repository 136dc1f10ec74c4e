"""Which models tiers are refused for, at start, rather than served wrongly or to no use."""

from typing import Any

from kv.errors import TierError

_REMEDY = "set tiers.host and tiers.disk to null for this model"


def refuse(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise `TierError` for a model whose blocks cannot come back from tiers."""
    model = vllm_config.model_config.model
    kinds = sorted({type(g.kv_cache_spec).__name__ for g in kv_cache_config.kv_cache_groups})
    if not vllm_config.cache_config.enable_prefix_caching:
        # MLA on CPUs (vLLM 0.32, `CpuPlatform.check_and_update_config`): its kernels compute a
        # prompt from the first token on, and behind restored blocks they give other tokens.
        numbers = f"vLLM serves {'/'.join(kinds)} without a prefix cache here"
        raise TierError(f"tiers of {model}", numbers, _REMEDY)
