"""Replicas that die under requests: the client notices a pause at most."""

import concurrent.futures
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flow.cluster_process import Cluster, running
from tests.flow.stream import Stream
from tests.waiting import await_that

pytestmark = pytest.mark.real_model
GENERATED = 300
# What a lost decode replica had not read waits until its lease ends, which heartbeats prolonged.
LEASE_S = 30.0
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "grammar": {"structured_outputs": {"regex": "([a-z]{3} ){400}"}, "ignore_eos": False},
    "logprobs": {"logprobs": 2},
}


@pytest.fixture(scope="module")
def pools(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """One prefill and two decode replicas of the tiny model."""
    tmp = tmp_path_factory.mktemp("pools")
    config = tmp / "config.yaml"
    # However the machine's start-up probes fall out, a long prompt goes to the prefill replica.
    config.write_text("router: {assumed_streams: 1}\n")
    words = ("--decode", "2", "--model", str(tiny_model), "--config", str(config))
    memory = ("--engine-arg", "kv_cache_memory_bytes=134217728")
    with running(tmp, tiny_model.parent, free_port(), *words, *memory) as cluster:
        yield cluster


def _streams(cluster: Cluster) -> list[Stream]:
    prompts = [list(range(100 * i + 1, 100 * i + 70)) for i in range(1, 3)]
    options = {"model": "smollm2", "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True}
    return [
        Stream(cluster.url, "/v1/completions", {**options, "prompt": prompt, **KINDS[kind]})
        for kind in KINDS
        for prompt in prompts
    ]


def _await_middle(streams: list[Stream]) -> None:
    """Return when the streams have some 40 tokens each and none of them has failed."""

    def is_reached() -> bool:
        assert [stream.error for stream in streams] == [None] * len(streams)
        return sum(len(stream.tokens) for stream in streams) >= 40 * len(streams)

    await_that(is_reached, "streams are under way", 60, every_s=0.005)


def _kill_busiest(cluster: Cluster, role: str) -> int:
    """Kill the replica of a pool that runs most; its pid."""
    rows = [r for r in cluster.replicas().values() if r["role"] == role and r["state"] == "up"]
    busiest = max(rows, key=lambda row: int(row["running"]))
    os.kill(busiest["pid"], signal.SIGKILL)
    return int(busiest["pid"])


def test_streams_survive_the_death_of_their_decode_replica(pools: Cluster) -> None:
    """kill -9 in mid-stream: greedy streams, under penalties, a grammar and with logprobs, go on
    on the other replica with exactly the tokens of an undisturbed run; the dead replica comes
    back and is warmed."""
    undisturbed = _streams(pools)
    for stream in undisturbed:
        stream.join(120)
    truth = [stream.tokens for stream in undisturbed]
    assert all(len(tokens) == GENERATED for tokens in truth)
    for _ in range(2):
        streams = _streams(pools)
        _await_middle(streams)
        dead = _kill_busiest(pools, "decode")
        for stream in streams:
            stream.join(120)
        assert [stream.error for stream in streams] == [None] * len(streams)
        assert [stream.tokens for stream in streams] == truth
        pools.await_back("decode", 2, {dead})
    pools.await_rest(2.0 * LEASE_S)
    records = pools.get("/admin/decisions")["decisions"]
    carried = [r for r in records if r["plans"] > 1 and r["generated_tokens"] == GENERATED]
    assert carried
    assert all("reason=decode_lost" in record["plan"] for record in carried)


def test_streams_leave_a_decode_replica_that_hangs(pools: Cluster) -> None:
    """SIGSTOP in mid-stream: after some seconds of silence its streams go on on the other
    replica, greedy and exact; it gets no work while it hangs, and is used again afterwards."""
    undisturbed = _streams(pools)
    for stream in undisturbed:
        stream.join(120)
    truth = [stream.tokens for stream in undisturbed]
    streams = _streams(pools)
    _await_middle(streams)
    rows = [r for r in pools.replicas().values() if r["role"] == "decode"]
    pid = max(rows, key=lambda row: int(row["running"]))["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for stream in streams:
            stream.join(60)
        assert [stream.error for stream in streams] == [None] * len(streams)
        assert [stream.tokens for stream in streams] == truth
        states = {row["pid"]: row["state"] for row in pools.replicas().values()}
        assert states[pid] == "down"
    finally:
        os.kill(pid, signal.SIGCONT)
    pools.await_back("decode", 2, set())
    pools.await_rest(2.0 * LEASE_S)


def test_requests_survive_the_death_of_the_prefill_replica(pools: Cluster) -> None:
    """kill -9 while it computes prompts: they are computed where they are decoded."""

    numbers = itertools.count()

    def ask() -> httpx.Response:
        number = next(numbers)
        prompt = [(number * 7919 + i * 31) % 40_000 + 100 for i in range(3000)]
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 4}
        return httpx.post(f"{pools.url}/v1/completions", json=body, timeout=120)

    def goes_to_prefill() -> bool:
        return ask().headers["x-breakeven-plan"].startswith("remote")

    # Short prompts beside crashes and first grammars have told that it is slow; that fades.
    await_that(goes_to_prefill, "a long prompt goes to P", 60, 0.5)
    # As many as keep it busy until somebody looks.
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask) for _ in range(24)]
        await_that(lambda: pools.replicas()["prefill-0"]["running"], "prompts are computed", 20)
        dead = _kill_busiest(pools, "prefill")
        assert [each.result().status_code for each in asked] == [200] * 24
    pools.await_back("prefill", 1, {dead})
    pools.await_rest()


def test_with_every_engine_gone_the_answer_is_503(pools: Cluster) -> None:
    """No engine: 503 with Retry-After at once, streamed or not, until one is back."""
    dead = {row["pid"] for row in pools.replicas().values()}
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    await_that(lambda: all(row["state"] != "up" for row in pools.replicas().values()), "none is up")
    for stream in (False, True):
        began = time.monotonic()
        body = {"model": "smollm2", "prompt": [1, 2, 3], "max_tokens": 2, "stream": stream}
        answer = httpx.post(f"{pools.url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert time.monotonic() - began < 1.0
    pools.await_back("decode", 2, dead)
    answer = httpx.post(
        f"{pools.url}/v1/completions",
        json={"model": "smollm2", "prompt": [1, 2, 3], "max_tokens": 2},
        timeout=60,
    )
    assert answer.status_code == 200
