"""For whoever has two CUDA devices: the handoff between GPUs gives one engine's tokens.

Run with `pytest -m gpu`; `BREAKEVEN_GPU_MODEL` is not needed, the default model serves.
"""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.flow.cluster_process import running

pytestmark = pytest.mark.gpu


def test_a_remote_plan_equals_a_local_one(
    tmp_path: Path, default_model: Path, free_port: Callable[[], int]
) -> None:
    """On device `cuda` a prompt handed from P to D gives the tokens that D computes itself,
    and its bytes crossed NIXL."""
    overrides = tmp_path / "gpu.yaml"
    overrides.write_text(
        "device: cuda\nengine: {kv_cache_memory_bytes: null, distributed_executor_backend: null,"
        " gpu_memory_utilization: 0.3}\n"
    )
    words = ("--config", str(overrides))
    with running(tmp_path / "run", default_model.parent, free_port(), *words) as cluster:
        prompt = list(range(1000, 3000))
        body = {
            "model": "smollm2",
            "prompt": prompt,
            "max_tokens": 24,
            "temperature": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        remote = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
        assert remote.headers["x-breakeven-plan"].startswith("remote")
        assert cluster.total("transfer_bytes") > 0
        assert cluster.total("failed_transfers") == 0
        # Prompt logprobs force the plan to be local, under a salt that shares nothing.
        local = httpx.post(
            f"{cluster.url}/v1/completions",
            json={**body, "cache_salt": "apart", "prompt_logprobs": 0},
            timeout=120,
        )
        assert local.headers["x-breakeven-plan"].startswith("local")
        tokens = [json.loads(a.text)["choices"][0]["token_ids"] for a in (remote, local)]
        assert tokens[0] == tokens[1]
