"""A vault of a whole cluster: set in its file, listed by `status`, restarted by Serve."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flow.cluster_process import Cluster, start
from tests.flow.test_tiers_cluster import BLOCK_TOKENS, BLOCKS, _ask, _from
from tests.waiting import await_that

pytestmark = pytest.mark.real_model


def _shards(cluster: Cluster) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = cluster.get("/admin/replicas")["vault"]
    return shards


def test_a_vault_outlives_engines_and_itself(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """An engine that is killed has lost nothing, and a shard that is killed has its disk's blocks
    and is found at its new address. `down` leaves no process."""
    disk, config = tmp_path / "disk", tmp_path / "vault.yaml"
    # By costs such a small model computes: it is faster than the question to the vault.
    config.write_text(
        "router: {policy: least_loaded}\n"
        "tiers: {host: {bytes: 16777216}, vault: {memory_bytes: 33554432, "
        f"disk: {{path: {disk}, bytes: 67108864}}}}}}"
    )
    words = ["--config", str(config), "--model", str(tiny_model), "--prefill", "0", "--decode", "1"]
    words += ["--engine-arg", "kv_cache_memory_bytes=4194304", "--engine-arg", "max_model_len=2048"]
    cluster = start(tmp_path / "run", tiny_model.parent, free_port(), *words)
    try:
        await_that(lambda: len(_shards(cluster)) == 1, "the shard is listed", 10.0)
        cold = _ask(cluster, 1000)
        await_that(lambda: _shards(cluster)[0]["blocks"] >= BLOCKS, "it is stored", 20.0)
        for turn in (1, 2):
            [replica] = cluster.pool("decode")
            os.kill(replica["pid"], signal.SIGKILL)
            cluster.await_back("decode", 1, {replica["pid"]}, pairs=0)
            time.sleep(2.0)  # until it has looked up where the shard is, and reached it
            answer = _ask(cluster, 1000)
            assert answer.tokens == cold.tokens
            assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
            cluster.await_rest()
            assert _from(cluster, "vault") == turn * BLOCKS * BLOCK_TOKENS
            if turn == 1:
                _kill_shard(cluster)
        pid = _shards(cluster)[0]["pid"]
    finally:
        cluster.command("down")
        cluster.process.wait(60)
    assert not Path(f"/proc/{pid}").exists()
    assert list((disk / "vault-0").rglob("*.seg"))


def _kill_shard(cluster: Cluster) -> None:
    [shard] = _shards(cluster)
    os.kill(shard["pid"], signal.SIGKILL)

    def back() -> bool:
        found = _shards(cluster)
        return bool(found) and found[0]["pid"] != shard["pid"] and found[0]["blocks"] >= BLOCKS

    await_that(back, "another process has the shard's blocks", 60.0)
