"""What users of other disaggregated servers complain of, one test each (on real processes).

The same properties are held in virtual time by tests/sim: slow loads and pinned blocks by
`test_a_read_from_a_prefill_replica_that_hangs_is_given_up` and
`test_blocks_are_kept_for_a_reader_that_may_only_hang`, hot spots by
`test_affinity_makes_no_hot_spot`, a lost catalogue by tests/sim/test_sim_catalogue.py. Clients
that leave at other moments are in tests/flow/test_disconnect.py.
"""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.fault.faults import (
    LEASE_S,
    LONG,
    ask,
    ask_long,
    ask_short,
    decision,
    half_way,
    pair,
    struck,
)
from tests.flow.cluster_process import Cluster
from tests.waiting import await_that

Truth = dict[str, list[int]]
_PLANS, _BLIND = "breakeven_plan_total", 'reason="no_catalogue"'


@dataclass(frozen=True)
class Restarted:
    """A prompt that two replicas had cached, which were then killed and have come back."""

    salt: str
    cached_before: int
    failed_before: int


@pytest.fixture(scope="module")
def restarted(shared_pools: tuple[Cluster, Any], truth: Truth) -> Restarted:
    """Both holders of one prompt are killed with its blocks, and Serve has restarted them."""
    pools, salt = shared_pools[0], "wiped"
    holders = pair(pools, decision(pools, ask_long(pools, salt).done()))
    pools.await_rest()
    again = ask_long(pools, salt).done()
    assert again.tokens == truth["long"]
    cached = decision(pools, again)["cached_tokens"]
    failed = pools.total("failed_transfers")
    with struck("kill", *(pools.replicas()[name]["pid"] for name in holders)) as dead:
        for role in ("prefill", "decode"):
            pools.await_back(role, 2, dead, pairs=2)
    return Restarted(salt, cached, failed)


def test_the_index_credits_a_wiped_engine(
    pools: Cluster, restarted: Restarted, truth: Truth
) -> None:
    """A restarted engine carries the name of the dead one and none of its blocks: the plan
    counts on none, and none is reported as cached."""
    assert restarted.cached_before > len(LONG) - 64
    stream = ask_long(pools, restarted.salt).done()
    assert stream.tokens == truth["long"]
    assert "hit=0" in stream.plan
    assert decision(pools, stream)["cached_tokens"] == 0


def test_stale_nixl_state_after_a_peer_restarts(
    pools: Cluster, restarted: Restarted, truth: Truth
) -> None:
    """Survivors read from restarted peers, and restarted peers from survivors: KV moves over
    every pair, all of it, without one failed transfer."""
    links = set(pools.get("/admin/curves")["links"])
    assert len(links) == 4
    before = pools.total("transfer_bytes")
    streams = [ask_long(pools, f"met-{number}") for number in range(6)]
    assert [stream.done().tokens for stream in streams] == [truth["long"]] * 6
    remote = [stream for stream in streams if stream.plan.startswith("remote")]
    assert remote
    pools.await_rest()
    per_token = pools.pool("decode")[0]["kv_bytes_per_token"]
    moved = pools.total("transfer_bytes") - before
    assert moved >= len(remote) * (len(LONG) // 32 * 32) * per_token
    assert pools.total("failed_transfers") <= restarted.failed_before


def test_http_200_with_garbage_after_a_failed_transfer(pools: Cluster, truth: Truth) -> None:
    """A prefill replica that is killed when half of its blocks have been read: the answer is
    that of an undisturbed run, and so is the next one from the cache. Half a prompt's blocks are
    never used."""
    before = pools.total("failed_transfers")
    with half_way(pools, "garbage") as reading:
        os.kill(reading.prefill["pid"], signal.SIGKILL)
        assert reading.stream.done().tokens == truth["long"]
        record = decision(pools, reading.stream)
        assert pools.total("failed_transfers") > before or record["plans"] > 1
    repeat = ask_long(pools, reading.salt).done()
    assert repeat.tokens == truth["long"]
    pools.await_back("prefill", 2, {reading.prefill["pid"]}, pairs=2)


def test_slow_loads_stall_a_minute_with_no_escape(pools: Cluster, truth: Truth) -> None:
    """A transfer that stands still is given up after 3 s of its source's silence: the request is
    planned again and answered, long before a timeout, and the half that came is not used."""
    with half_way(pools, "slow") as reading:
        began = time.monotonic()
        assert reading.stream.done(30).tokens == truth["long"]
        assert time.monotonic() - began < 20
        record = decision(pools, reading.stream)
        assert record["plans"] == 2
        assert "reason=prefill_lost" in record["plan"]
    pools.await_back("prefill", 2, (), pairs=2)
    pools.await_rest(LEASE_S - 2.0)


def test_blocks_leak_on_abort(pools: Cluster, truth: Truth) -> None:
    """A client that leaves in the middle of a transfer leaves nothing behind, on either side:
    the blocks are free as soon as the transfer is over."""
    with half_way(pools, "abort") as reading:
        stream = reading.stream
        stream.leave()
        stream.join(10)
        assert not stream.is_alive()
        await_that(lambda: decision(pools, stream)["outcome"] == "aborted", "it is aborted")
    pools.await_rest(LEASE_S - 2.0)
    assert ask_long(pools, "after-abort").done().tokens == truth["long"]


def test_dead_blocks_are_pinned_for_minutes(pools: Cluster, truth: Truth) -> None:
    """What a decode replica that hangs had begun to read stays for its lease and no longer (12 s
    here, 30 s by default, and what heartbeats added). When it goes on after that, with the pages
    full of other prompts, it takes none of them for what it had asked for."""
    with half_way(pools, "pinned") as reading, struck("stop", reading.decode["pid"]):
        salt = reading.salt
        os.kill(reading.prefill["pid"], signal.SIGCONT)
        assert reading.stream.done(30).tokens == truth["long"]

        def unpinned() -> bool:
            rows = pools.pool("prefill")
            return not any(row["leased"] or row["kv_usage"] for row in rows)

        await_that(unpinned, "the prefill replica's blocks are free", 2 * LEASE_S)
        others = [ask(pools, LONG[n:] + LONG[:n], 2, f"{salt}-{n}") for n in range(1, 13)]
        assert all(len(stream.done().tokens) == 2 for stream in others)
    pools.await_back("decode", 2, (), pairs=2)
    pools.await_rest(2 * LEASE_S)
    again = [ask_long(pools, salt) for _ in range(6)]
    assert [stream.done().tokens for stream in again] == [truth["long"]] * 6


def test_kv_routing_degrades_to_load_only_in_silence(pools: Cluster, truth: Truth) -> None:
    """While nobody can say what is cached where, each plan says so, a metric does, and `doctor`
    fails and names it; all of that ends with the fault."""

    def blind() -> float:
        counts = pools.metrics().items()
        return sum(n for name, n in counts if name.startswith(_PLANS) and _BLIND in name)

    before = blind()
    with struck("stop", pools.get("/admin/replicas")["catalogue"]["pid"]):
        await_that(lambda: pools.metrics()["breakeven_catalogue_up"] == 0, "it is told")
        stream = ask_short(pools, "silence").done()
        assert stream.tokens == truth["short"]
        assert "reason=no_catalogue" in stream.plan
        assert blind() == before + 1
        doctor = pools.command("doctor", "--json")
        assert doctor.returncode == 1
        assert "catalogue" in doctor.stdout
    await_that(lambda: pools.metrics()["breakeven_catalogue_up"] == 1, "it is back")
    assert "no_catalogue" not in ask_short(pools, "no-silence").done().plan


def test_affinity_makes_hot_spots(pools: Cluster) -> None:
    """Many requests that begin alike are not all sent to the one replica that has their prefix:
    past some load, computing the prefix once more is cheaper than to wait."""
    stem = [(i * 31) % 30_000 + 50 for i in range(320)]
    ask(pools, [*stem, 7], 2, "hot").done()
    streams = [ask(pools, [*stem, 900 + n], 400, "hot") for n in range(16)]
    peaks: dict[str, int] = {}
    while any(stream.is_alive() for stream in streams):
        for row in pools.pool("decode"):
            peaks[row["name"]] = max(peaks.get(row["name"], 0), row["running"])
        time.sleep(0.05)
    assert all(len(stream.done().tokens) == 400 for stream in streams)
    assert min(peaks.values()) >= 3, peaks


def test_disaggregation_is_slower_and_nobody_notices(pools: Cluster, truth: Truth) -> None:
    """Each decision stands beside what was not chosen: the audit keeps the time that computing on
    a decode replica was predicted to take, the prediction for the chosen plan and what it
    really took, and a metric counts how far the two are apart."""
    count = 'breakeven_plan_error_ratio_count{plan="remote"}'
    before = pools.metrics().get(count, 0.0)
    stream = ask_long(pools, "noticed").done()
    record = decision(pools, stream)
    assert record["plan"].startswith("remote")
    local = [rival for rival in record["rivals"] if rival["shape"] == "local"]
    assert local
    assert all(rival["predicted_ttft_s"] > 0 for rival in local)
    assert record["predicted_ttft_s"] > 0
    assert record["ttft_s"] > 0
    await_that(lambda: pools.metrics().get(count) == before + 1, "it is counted")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_cached_tokens_are_not_reported(pools: Cluster, path: str) -> None:
    """Every API says how much of a repeated prompt was cached, and the audit says the same."""
    words = f"The harbour has {path} lamps, and each of them is lit at night. " * 12
    body: dict[str, Any] = {"model": "smollm2", "max_tokens": 2, "temperature": 0}
    if path == "/v1/completions":
        body["prompt"] = words
    else:
        body["messages"] = [{"role": "user", "content": words}]
    httpx.post(pools.url + path, json=body, timeout=60).raise_for_status()
    pools.await_rest()
    headers = {"x-request-id": f"cached{path.replace('/', '-')}"}
    answer = httpx.post(pools.url + path, json=body, headers=headers, timeout=60)
    usage = answer.json()["usage"]
    reported = (
        usage["cache_read_input_tokens"]
        if path == "/v1/messages"
        else usage["prompt_tokens_details"]["cached_tokens"]
    )
    records = pools.get("/admin/decisions")["decisions"]
    (record,) = [r for r in records if r["request_id"] == headers["x-request-id"]]
    assert reported == record["cached_tokens"] > 0
    assert record["prompt_tokens"] - reported <= 32
