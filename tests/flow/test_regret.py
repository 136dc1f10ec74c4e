"""What evictions cost, from a real engine's events to the ingress that plans by it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow.cluster_process import running
from tests.flow.test_tiers_cluster import BLOCKS, _ask
from tests.waiting import await_that

pytestmark = pytest.mark.real_model
REGRET = "breakeven_eviction_regret_ratio"


def test_a_working_set_that_does_not_fit_is_regretted(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """Prompts that are used once push each other out, and nobody misses them; a round of prompts
    half as large again as the cache misses each when its turn comes."""
    words = ["--model", str(tiny_model), "--prefill", "0", "--decode", "1"]
    words += ["--engine-arg", "kv_cache_memory_bytes=4194304", "--engine-arg", "max_model_len=2048"]
    with running(tmp_path / "run", tiny_model.parent, free_port(), *words) as cluster:
        starts = iter(range(1000, 30_000, 700))
        cached = 0
        while (now := cluster.cached_blocks()) > cached or not now:
            cached = now
            for _ in range(4):
                _ask(cluster, next(starts))
        assert cluster.metrics()[REGRET] == 0.0
        turns = [30_000 + 700 * turn for turn in range(3 * cached // 2 // BLOCKS)]
        for _ in range(4):
            for turn in turns:
                assert _ask(cluster, turn).cached_tokens == 0
        await_that(lambda: cluster.metrics()[REGRET] > 0.3, "what was evicted is missed", 10.0)
