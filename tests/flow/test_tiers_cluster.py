"""Tiers of a whole cluster: set in its file, counted in its metrics; only the disk outlives it."""

import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flow.cluster_process import Cluster, start

pytestmark = pytest.mark.real_model
BLOCKS, BLOCK_TOKENS = 20, 32


def _ask(cluster: Cluster, first: int) -> list[int]:
    body: dict[str, Any] = {
        "model": "smollm2",
        "prompt": [first + n for n in range(BLOCKS * BLOCK_TOKENS + 5)],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def _from(cluster: Cluster, source: str) -> float:
    time.sleep(1.5)  # a replica tells at least once a second
    return cluster.metrics()[f'breakeven_prompt_tokens_total{{source="{source}"}}']


def test_tiers_from_the_file_to_the_metrics(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """A displaced prompt comes from host memory, after a crash of the engine from disk; the
    tokens do not change. Nothing stays in shared memory, and what stays on disk is private."""
    segments = set(os.listdir("/dev/shm"))
    disk, config = tmp_path / "disk", tmp_path / "tiers.yaml"
    config.write_text(
        f"tiers: {{host: {{bytes: 16777216}}, disk: {{path: {disk}, bytes: 67108864}}}}"
    )
    words = ["--config", str(config), "--model", str(tiny_model), "--prefill", "0", "--decode", "1"]
    words += ["--engine-arg", "kv_cache_memory_bytes=4194304", "--engine-arg", "max_model_len=2048"]
    cluster = start(tmp_path / "run", tiny_model.parent, free_port(), *words)
    try:
        cold = _ask(cluster, 1000)
        for first in range(2000, 12000, 1000):
            _ask(cluster, first)
        assert _from(cluster, "host") == 0
        assert _ask(cluster, 1000) == cold
        cluster.await_rest()
        assert _from(cluster, "host") == BLOCKS * BLOCK_TOKENS
        [replica] = cluster.pool("decode")
        os.kill(replica["pid"], signal.SIGKILL)
        cluster.await_back("decode", 1, {replica["pid"]}, pairs=0)
        assert _ask(cluster, 1000) == cold
        cluster.await_rest()
        assert _from(cluster, "disk") == BLOCKS * BLOCK_TOKENS
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("vllm_offload_b")]
    finally:
        cluster.command("down")
        cluster.process.wait(60)
    assert set(os.listdir("/dev/shm")) <= segments
    files = [path for path in disk.rglob("*") if path.is_file()]
    assert len(files) > BLOCKS
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
