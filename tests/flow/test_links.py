"""A cluster over two Ray nodes whose link is slow: KV crosses it, at its rate, and nothing else is
different."""

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
PROMPT_TOKENS, ANSWER_TOKENS, BLOCK_TOKENS = 4000, 12, 32
WHOLE_BLOCKS = (PROMPT_TOKENS - 1) // BLOCK_TOKENS
# Slower than the vault tier would wait for if its plan did not say so.
SLOW_BITS_PER_S = 10e6
# What of a rate is TCP's data, and what this machine may add in scheduling.
LEAST, MOST = 0.9, 1.25
ENGINE = {"max_model_len": 8192, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture(scope="module", autouse=True)
def able() -> None:
    """Namespaces need root; what is missing is the reason."""
    try:
        check()
    except LinkRefusedError as refusal:
        pytest.skip(str(refusal))


def prompt(number: int) -> list[int]:
    """Token ids that no other number's prompt begins with."""
    return [1000 + 7 * number + (n * n + number) % 40_000 for n in range(PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> list[list[int]]:
    """What one plain vLLM engine answers to the first prompts."""
    return greedy(tiny_model, [{"ids": prompt(n), "n": ANSWER_TOKENS} for n in range(3)])


@pytest.fixture
def handing(tiny_model: Path) -> Iterator[LinkedCluster]:
    """Prefill on the far node, decode on the near one."""
    sections = {
        "engine": ENGINE,
        "prefill": {"replicas": 1, "resources": {"far": 1}, "surge": False},
        "decode": {"replicas": 1, "resources": {"near": 1}, "surge": False},
        "router": {"policy": "least_loaded"},
    }
    with linked(Shape(), sections, tiny_model) as cluster:
        yield cluster


@pytest.fixture
def vaulted(tiny_model: Path) -> Iterator[LinkedCluster]:
    """A vault on the far node, decode on the near one."""
    vault = {"shards": 1, "memory_bytes": 1 << 27, "resources": {"far": 1}}
    sections = {
        "engine": ENGINE,
        "prefill": {"replicas": 0},
        "decode": {"replicas": 1, "resources": {"near": 1}, "surge": False},
        "tiers": {"host": {"bytes": 1 << 26}, "vault": vault, "load_timeout_s": 60},
        "router": {"policy": "always_fetch"},
    }
    with linked(Shape(), sections, tiny_model) as cluster:
        yield cluster


def ask(cluster: LinkedCluster, number: int) -> tuple[list[int], float]:
    """The answer's tokens, and the seconds that it took."""
    body = {
        "model": "smollm2",
        "prompt": prompt(number),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    began = time.monotonic()
    answer = cluster.post("/v1/completions", body)
    return answer["choices"][0]["token_ids"], time.monotonic() - began


def kv_seconds(row: dict[str, Any]) -> float:
    """What the whole blocks of a prompt take at the slow rate."""
    kv_bytes: int = WHOLE_BLOCKS * BLOCK_TOKENS * row["kv_bytes_per_token"]
    return 8 * kv_bytes / SLOW_BITS_PER_S


def test_replicas_of_two_nodes_hand_over_at_the_link_s_rate(
    handing: LinkedCluster, plain: list[list[int]]
) -> None:
    """Tokens are a plain engine's. Each replica is known by its own node's address, KV crosses by
    TCP on that node's device, and takes the time that the link's rate makes it take."""
    addresses = [end.address for end in handing.link.ends]
    rows = handing.replicas()
    assert [rows[name]["node"] for name in ("decode-0", "prefill-0")] == addresses
    fast, fast_s = ask(handing, 0)
    handing.link.limit(SLOW_BITS_PER_S)
    before_s = _transfer_s(handing)
    slow, slow_s = ask(handing, 1)
    handing.link.limit(None)
    assert [fast, slow] == plain[:2]
    expected_s = kv_seconds(rows["decode-0"])
    assert LEAST * expected_s < slow_s - fast_s < MOST * expected_s
    took_s = _transfer_s(handing) - before_s
    assert LEAST * expected_s < took_s < MOST * expected_s
    row = handing.replicas()["decode-0"]
    assert row["lanes"] == ["tcp/wire"]
    assert row["failed_transfers"] == 0
    assert row["transfer_bytes"] >= 2 * SLOW_BITS_PER_S / 8 * expected_s


def _transfer_s(cluster: LinkedCluster) -> float:
    time.sleep(1.5)  # a replica tells at least once a second
    name = 'breakeven_transfer_seconds_total{source_tier="device",transport="tcp/wire"}'
    return cluster.metrics()[name]


def test_a_vault_of_another_node_gives_at_the_link_s_rate(
    vaulted: LinkedCluster, plain: list[list[int]]
) -> None:
    """A prompt that only the far vault holds comes from there, in the link's time; its answer is a
    plain engine's, as the one was that computed it."""
    [shard] = vaulted.get("/admin/replicas")["vault"]
    assert shard["node"] == vaulted.link.ends[1].address
    cold, _ = ask(vaulted, 2)
    await_that(lambda: _stored(vaulted) >= WHOLE_BLOCKS, "the vault has it", 20.0)
    vaulted.reset("decode-0")
    row = vaulted.replicas()["decode-0"]
    warm, fast_s = ask(vaulted, 2)
    vaulted.reset("decode-0")
    vaulted.link.limit(SLOW_BITS_PER_S)
    slow, slow_s = ask(vaulted, 2)
    vaulted.link.limit(None)
    assert cold == warm == slow == plain[2]
    expected_s = kv_seconds(row)
    assert LEAST * expected_s < slow_s - fast_s < MOST * expected_s
    *_, last = vaulted.get("/admin/decisions")["decisions"]
    assert last["sources"]["decode"]["vault"] == WHOLE_BLOCKS * BLOCK_TOKENS
    assert vaulted.replicas()["decode-0"]["lanes"] == ["tcp/wire"]


def _stored(cluster: LinkedCluster) -> int:
    [shard] = cluster.get("/admin/replicas")["vault"]
    return int(shard["blocks"])
