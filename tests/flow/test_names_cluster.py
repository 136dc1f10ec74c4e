"""Exact and lossy blocks of one prompt in a whole cluster: a request that allows the codec may use
either, others the exact ones alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flow.cluster_process import Cluster, running
from tests.flow.test_quality import calibrate
from tests.flow.test_tiers_cluster import BLOCK_TOKENS, Answer

pytestmark = pytest.mark.real_model
BLOCKS = 50
FULL = BLOCKS * BLOCK_TOKENS


def _ask(cluster: Cluster, first: int, **headers: str) -> Answer:
    body: dict[str, Any] = {
        "model": "smollm2",
        "prompt": [first + n for n in range(FULL + 5)],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    cached = (said["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    cluster.cached_blocks()  # the catalogue knows of it
    return Answer(said["choices"][0]["token_ids"], answer.headers["x-breakeven-plan"], cached)


def test_a_request_that_allows_a_codec_may_use_exact_blocks(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """What is cached exactly is a hit for it, with the same tokens; what it computed itself is no
    hit for others."""
    config = tmp_path / "names.yaml"
    # A verdict is of these engine options, too.
    config.write_text(
        "engine: {max_model_len: 2048}\ntiers: {vault: {memory_bytes: 33554432, lossy: fp16}}"
    )
    words = ["--config", str(config), "--model", str(tiny_model)]
    status, [verdict], _ = calibrate(tmp_path / "run" / "cache", *words, "--codecs", "fp16")
    assert (status, verdict["allowed"]) == (0, True)
    words += ["--prefill", "0", "--decode", "1"]
    with running(tmp_path / "run", tiny_model.parent, free_port(), *words) as cluster:
        allows = {"x-breakeven-codec": "fp16"}
        cold = _ask(cluster, 1000)
        again = _ask(cluster, 1000, **allows)
        assert again.plan.endswith("reason=exact_names")
        assert (cold.cached_tokens, again.cached_tokens) == (0, FULL)
        assert again.tokens == cold.tokens
        own = _ask(cluster, 3000, **allows)
        repeated = _ask(cluster, 3000, **allows)
        assert repeated.cached_tokens == FULL
        assert "exact_names" not in own.plan + repeated.plan
        exact = _ask(cluster, 3000)
        assert exact.cached_tokens == 0
        assert exact.tokens == own.tokens
