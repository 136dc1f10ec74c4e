"""vLLM's own options, from our config's `engine:` mapping.

The same namespace configures the engines and the ingress's API server, so that parsers,
chat templates, limits and names agree. Unknown options are vLLM's to refuse.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from workers.errors import EngineOptionError

# What Breakeven itself decides; a value from outside would silently break the plan.
_OURS = frozenset(
    {
        "model",
        "served_model_name",
        "kv_transfer_config",
        "kv_events_config",
        "kv_offloading_backend",
        "kv_offloading_size",
        "prefix_caching_hash_algo",
        "enable_prefix_caching",
        "scheduling_policy",
        "host",
        "port",
        "api_key",
        "enable_log_requests",
        "data_parallel_size",
        "enable_lora",
        "logits_processors",
        "lora_modules",
    }
)


def namespace(
    model: str, served_names: tuple[str, ...], engine: Mapping[str, Any]
) -> argparse.Namespace:
    """vLLM's parsed server arguments; raises `EngineOptionError` in vLLM's own words."""
    taken = sorted(_OURS & engine.keys())
    if taken:
        raise EngineOptionError(", ".join(taken), "set by Breakeven, not by `engine:`")
    argv = ["--model", model, "--served-model-name", *served_names, "--enable-prefix-caching"]
    argv += ["--prefix-caching-hash-algo", "sha256_cbor", "--enable-prompt-tokens-details"]
    argv += ["--logits-processors", "workers.penalties:CarriedPenalties"]
    # Who comes first is the router's to say (`Submit.patience_s`), never a client's.
    argv += ["--scheduling-policy", "priority"]
    argv += [word for name, value in engine.items() for word in _words(name, value)]
    parser = make_arg_parser(_Parser(prog="engine"))
    parsed: argparse.Namespace = parser.parse_args(argv)
    _validate(parsed)
    parsed.model = model
    return parsed


def engine_config(
    parsed: argparse.Namespace, transfer: Mapping[str, Any] | None, events: bool
) -> VllmConfig:
    """vLLM's config of one engine, or of the ingress when `transfer` is None."""
    args = AsyncEngineArgs.from_cli_args(parsed)
    if transfer is not None:
        args.kv_transfer_config = dict(transfer)
    if events:
        args.kv_events_config = {
            "enable_kv_cache_events": True,
            "publisher": "null",
        }
    try:
        return args.create_engine_config()
    except (ValueError, TypeError, OSError) as error:
        raise EngineOptionError(f"model {parsed.model}", str(error)) from error


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EngineOptionError("engine", message)


def _validate(parsed: argparse.Namespace) -> None:
    try:
        validate_parsed_serve_args(parsed)
    except (ValueError, TypeError) as error:
        raise EngineOptionError("engine", str(error)) from error


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"]
    if isinstance(value, Mapping | list):
        return [f"--{flag}", json.dumps(value)]
    return [f"--{flag}", str(value)]


def hardware(config: VllmConfig) -> str:
    """What decides how fast an engine computes, beside its model."""
    model, parallel = config.model_config, config.parallel_config
    parts = (
        current_platform.get_device_name(),
        torch.get_num_threads(),
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        model.dtype,
        config.cache_config.cache_dtype,
        model.quantization,
        model.enforce_eager,
        config.scheduler_config.max_num_batched_tokens,
    )
    return "/".join(map(str, parts))
