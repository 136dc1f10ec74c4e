"""Endpoints for Prometheus."""

import urllib.request

import pytest
from prometheus_client import REGISTRY, Counter
from prometheus_client.parser import text_string_to_metric_families

from kv.catalogue import Tier
from kv.vault.wire import Stats, by_codec
from workers.errors import MetricsPortError
from workers.messages import Load, TierLoad, Totals
from workers.metrics import Endpoint, EngineMetrics, ShardMetrics

LOAD = Load(
    running=3,
    leased=2,
    kv_usage=0.25,
    totals=Totals(prompt_tokens_computed=70, prompt_tokens_received=30, transfer_bytes=4096),
    tiers={Tier.HOST: TierLoad(blocks=7, unnamed=0, latency_s=0.001, per_byte_s=1e-9)},
)
STATS = Stats(0, 5, 900, 100, 0, 0, {"raw": 300, "int8": 200})


def _samples(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {each.name + "".join(map(str, each.labels.values())): each.value for each in samples}


def test_an_engine_answers_with_its_load_as_it_is_now() -> None:
    """Gauges, counters, tokens by source, blocks by tier; the next time what is true then."""
    loads = [LOAD, Load(running=1)]
    endpoint = Endpoint("127.0.0.1", None, EngineMetrics(lambda: loads[0]))
    try:
        found = _samples(endpoint.address)
        assert found["breakeven_engine_running"] == 3
        assert found["breakeven_engine_leased"] == 2
        assert found["breakeven_engine_kv_usage_ratio"] == 0.25
        assert found["breakeven_engine_transfer_bytes_total"] == 4096
        assert found["breakeven_engine_prompt_tokens_totalcomputed"] == 70
        assert found["breakeven_engine_prompt_tokens_totalreceived"] == 30
        assert found["breakeven_engine_tier_blockshost"] == 7
        assert "process_resident_memory_bytes" in found
        loads.pop(0)
        assert _samples(endpoint.address)["breakeven_engine_running"] == 1
    finally:
        endpoint.close()


def test_names_are_as_vllm_documents_them() -> None:
    """Whatever format Prometheus prefers: a colon in a name stays one."""
    held = Counter("vllm:of_this_test", "", registry=REGISTRY)
    endpoint = Endpoint("127.0.0.1", None, EngineMetrics(lambda: LOAD))
    try:
        prefers = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        asked = urllib.request.Request(f"http://{endpoint.address}/metrics", headers=prefers)
        with urllib.request.urlopen(asked, timeout=5) as answer:
            assert "\nvllm:of_this_test_total 0.0\n" in answer.read().decode()
    finally:
        endpoint.close()
        REGISTRY.unregister(held)


def test_a_port_that_is_taken_is_told_with_the_remedy() -> None:
    """And the first one goes on; once it is closed its port and its names are free."""
    shard = ShardMetrics(lambda: STATS, 1000)
    first = Endpoint("127.0.0.1", None, shard)
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(MetricsPortError, match=rf"127.0.0.1:{port}: .*in use.*port: null"):
        Endpoint("127.0.0.1", port, EngineMetrics(lambda: LOAD))
    assert _samples(first.address)["breakeven_shard_quota_bytes"] == 1000
    first.close()
    second = Endpoint("127.0.0.1", port, shard)
    assert _samples(second.address)["breakeven_shard_stored_bytes"] == 900
    second.close()


def test_bytes_are_by_codec_as_far_as_a_shard_knows() -> None:
    """Frames in memory by their codec, the others by where they lie; the sum is what is stored."""
    assert by_codec(STATS) == {"raw": 300, "int8": 200, "on_disk": 400}
    assert by_codec(Stats(0, 2, 500, 0, 0, 0, {"raw": 500})) == {"raw": 500}
