"""Tiers of a whole cluster: set in its file, counted in its metrics; only the disk outlives it."""

import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flow.cluster_process import Cluster, start

pytestmark = pytest.mark.real_model
BLOCKS, BLOCK_TOKENS = 20, 32
FULL = BLOCKS * BLOCK_TOKENS


@dataclass(frozen=True)
class Answer:
    """Its tokens, the plan that it came by, and how much of the prompt was not computed."""

    tokens: list[int]
    plan: str
    cached_tokens: int


def _ask(cluster: Cluster, first: int) -> Answer:
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
    said = answer.json()
    cached = (said["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    plan = answer.headers["x-breakeven-plan"]
    return Answer(said["choices"][0]["token_ids"], plan, cached)


def _from(cluster: Cluster, source: str) -> float:
    time.sleep(1.5)  # a replica tells at least once a second
    return cluster.metrics()[f'breakeven_prompt_tokens_total{{source="{source}"}}']


def test_tiers_from_the_file_to_the_metrics(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """A displaced prompt comes from host memory, as its plan says; after a crash of the engine from
    disk, of which no plan can know. The tokens do not change. Nothing stays in shared memory, and
    what stays on disk is private."""
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
        again = _ask(cluster, 1000)
        assert again.tokens == cold.tokens
        assert f" fetch={FULL}@decode-0/host compute=5@decode-0;" in again.plan
        assert again.plan.endswith("reason=cheaper_fetch")
        assert (cold.cached_tokens, again.cached_tokens) == (0, FULL)
        cluster.await_rest()
        assert _from(cluster, "host") == FULL
        [replica] = cluster.pool("decode")
        os.kill(replica["pid"], signal.SIGKILL)
        cluster.await_back("decode", 1, {replica["pid"]}, pairs=0)
        after = _ask(cluster, 1000)
        assert after.tokens == cold.tokens
        assert after.plan.startswith("local; hit=0 compute=")
        assert after.cached_tokens == FULL
        cluster.await_rest()
        assert _from(cluster, "disk") == FULL
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("vllm_offload_b")]
    finally:
        cluster.command("down")
        cluster.process.wait(60)
    assert set(os.listdir("/dev/shm")) <= segments
    files = [path for path in disk.rglob("*") if path.is_file()]
    assert len(files) > BLOCKS
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
