"""A planner that splits by itself, over a link on which fetching a prompt takes about as long as
computing it."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.links.cluster import LinkedCluster, linked
from benchmarks.links.network import LinkRefusedError, Shape, check
from tests.flow.plain_engine import greedy
from tests.waiting import await_that

pytestmark = pytest.mark.real_model
REPLICAS = ("decode-0", "prefill-0")
PROMPT_TOKENS, ANSWER_TOKENS, BLOCK_TOKENS = 1500, 12, 32
WHOLE_BLOCKS = (PROMPT_TOKENS - 1) // BLOCK_TOKENS
PROMPT = [1000 + 7 * n % 30_000 for n in range(PROMPT_TOKENS)]
# Curves know a replica and a link after so many requests.
LEARNING = 4


@pytest.fixture
def split_cluster(default_model: Path) -> Iterator[LinkedCluster]:
    """Both engines on the near node, the vault on the far one, the default model."""
    try:
        check()
    except LinkRefusedError as refusal:
        pytest.skip(str(refusal))
    here = {"replicas": 1, "resources": {"near": 1}, "surge": False}
    vault = {"shards": 1, "memory_bytes": 1 << 28, "resources": {"far": 1}}
    sections = {
        "prefill": here,
        "decode": here,
        "router": {"explore": 0, "assumed_streams": 0, "retry_s": None},
        "tiers": {"host": {"bytes": 1 << 28}, "peer": {}, "vault": vault, "load_timeout_s": 60},
    }
    with linked(Shape(), sections, default_model) as cluster:
        yield cluster


def ask(cluster: LinkedCluster, policy: str) -> tuple[list[int], dict[str, Any]]:
    """The answer's tokens by this policy, where only the vault holds the prompt; and its record."""
    cluster.post("/admin/policy", {"policy": policy})
    cluster.settle(*REPLICAS)
    body = {
        "model": "smollm2",
        "prompt": PROMPT,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = cluster.post("/v1/completions", body)
    time.sleep(0.1)  # its record is closed behind the last byte
    *_, record = cluster.get("/admin/decisions")["decisions"]
    return answer["choices"][0]["token_ids"], record


def test_a_prompt_is_split_where_fetching_takes_as_long_as_computing(
    split_cluster: LinkedCluster, default_model: Path
) -> None:
    """The link is set to bring the prompt in the time that computing it took. Then the plan is a
    split: a part comes over the link, a part from the prefill replica, the answer is a plain
    engine's, and it begins sooner than either plan's did."""
    [plain] = greedy(default_model, [{"ids": PROMPT, "n": ANSWER_TOKENS}])
    cluster = split_cluster
    computed = [ask(cluster, "always_compute") for _ in range(LEARNING)]
    await_that(lambda: _stored(cluster) >= WHOLE_BLOCKS, "the vault has it", 30.0)
    computing_s = statistics.median(record["ttft_s"] for _, record in computed)
    cluster.link.limit(8 * _kv_bytes(cluster) / computing_s)
    fetched = [ask(cluster, "always_fetch") for _ in range(LEARNING)]
    fetching_s = statistics.median(record["ttft_s"] for _, record in fetched)
    ask(cluster, "breakeven")  # engines meet
    divided = [ask(cluster, "breakeven") for _ in range(3)]
    cluster.link.limit(None)
    assert all(tokens == plain for tokens, _ in (*computed, *fetched, *divided))
    plans = [record["plan"] for _, record in divided]
    assert all(plan.startswith("split; ") for plan in plans), plans
    for _, record in divided:
        sources = record["sources"]["decode"]
        assert sources["vault"] > 0
        assert sources["peer"] > 0
        assert sources["vault"] + sources["peer"] == WHOLE_BLOCKS * BLOCK_TOKENS
    splitting_s = statistics.median(record["ttft_s"] for _, record in divided)
    assert splitting_s < min(computing_s, fetching_s)


def _kv_bytes(cluster: LinkedCluster) -> int:
    row = cluster.replicas()["decode-0"]
    return WHOLE_BLOCKS * BLOCK_TOKENS * int(row["kv_bytes_per_token"])


def _stored(cluster: LinkedCluster) -> int:
    [shard] = cluster.get("/admin/replicas")["vault"]
    return int(shard["blocks"])
