"""What an ingress tells of each replica and of what things cost."""

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from prometheus_client.registry import Collector

from kv.catalogue import Tier
from kv.curve import LinkCurve
from router.curve_book import KeptLink
from router.curve_metrics import CurveMetrics
from router.curves import curves_of
from router.replica_metrics import ReplicaMetrics
from router.targets import targets_of
from tests.sim.world import COSTS, World, request, world
from workers.messages import FetchLoad, Load, LossyLoad, Role, TierLoad

# The event loop's clock is not the wall's: what sleeps takes no time.
pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


def _samples(collector: Collector) -> dict[tuple[Any, ...], float]:
    found = (sample for metric in collector.collect() for sample in metric.samples)
    return {(each.name, *each.labels.values()): each.value for each in found}


def _load(here: World, name: str, **changes: Any) -> None:
    member = here.fleet.member(name)
    assert member is not None
    member.load = msgspec.structs.replace(member.load, **changes)


async def test_a_replica_s_load_is_told_and_goes_with_it() -> None:
    """A hung one has none, rather than what it told last."""
    async with world() as here:
        _load(here, "decode-0", running=3, waiting=2, kv_usage=0.5)
        found = _samples(ReplicaMetrics(here.fleet))
        assert found["breakeven_replica_running", "decode", "decode-0"] == 3
        assert found["breakeven_replica_waiting", "decode", "decode-0"] == 2
        assert found["breakeven_replica_kv_usage", "decode", "decode-0"] == 0.5
        here.engine("decode-0").hang()
        await asyncio.sleep(5.0)
        found = _samples(ReplicaMetrics(here.fleet))
        assert found["breakeven_replica_running", "decode", "decode-0"] == 0


async def test_a_fallback_is_a_node_with_rdma_whose_replica_reads_by_tcp() -> None:
    """Not one that reads by RDMA, nor by shared memory alone, nor one that has no device."""
    async with world() as here:
        for lanes, rdma, fallbacks in (
            (("tcp/eth0",), True, 1),
            (("sysv/memory", "tcp/eth0"), True, 1),
            (("rc_mlx5/mlx5_0:1", "tcp/eth0"), True, 0),
            (("cuda_ipc/cuda", "cma/memory"), True, 0),
            (("tcp/eth0",), False, 0),
        ):
            _load(here, "decode-0", lanes=lanes)
            member = here.fleet.member("decode-0")
            assert member is not None
            member.replica = msgspec.structs.replace(member.replica, rdma=rdma)
            told = _samples(ReplicaMetrics(here.fleet))
            assert told[("breakeven_rdma_fallbacks",)] == fallbacks, lanes


async def test_costs_are_medians_of_what_plans_go_by() -> None:
    """Links by their first tier and transport; as /admin/curves has them one by one."""
    async with world() as here:
        await here.ask(request("r", range(400), 3))
        host = TierLoad(blocks=4, unnamed=0, latency_s=0.002, per_byte_s=1e-9)
        for name in ("decode-0", "decode-1"):
            _load(here, name, lanes=("cma/memory",), tiers={Tier.HOST: host})
        found, rows = _samples(CurveMetrics(here.fleet)), curves_of(here.fleet)
        latencies = sorted(row["latency_s"] for row in rows["links"].values())
        told = found["breakeven_link_latency_seconds", "device", "cma/memory"]
        assert latencies[0] <= told <= latencies[-1]
        assert found["breakeven_link_latency_seconds", "host", "local"] == 0.002
        assert found["breakeven_link_seconds_per_byte", "host", "local"] == 1e-9
        crossover = rows["tiers"]["decode-0"]["host"]["crossover_tokens"]
        assert round(found["breakeven_crossover_tokens", "host", "local"], 1) == crossover
        speed = here.fleet.members()[0].speed.curve.seconds(1024, 0)
        assert found["breakeven_prefill_seconds", "decode"] == speed


VAULT = TierLoad(
    0, 1, 0.3, 2e-9, 20, LossyLoad(0.1, 1e-9, 9, ((900, 0.2),), 0.25), ((500, 0.4), (700, 0.5))
)


async def test_a_tier_is_told_with_its_points_and_its_codec_s_curve() -> None:
    """Where they are asked for; and at the curve that plans go by, which is that of whoever on the
    node used the vault last."""
    async with world(hardware="cpu") as here:
        guess = TierLoad(0, 1, 0.02, 2e-9, 0, LossyLoad(0.02, 1e-9, 0, (), 0.25))
        for name, told in (("decode-0", guess), ("decode-1", VAULT)):
            member = here.fleet.member(name)
            assert member is not None
            member.receive(Load(tiers={Tier.VAULT: told}))
        rows = curves_of(here.fleet, points=True)["tiers"]
        for name in ("decode-0", "decode-1"):
            row = rows[name]["vault"]
            assert (row["latency_s"], row["samples"]) == (0.3, 20)
            assert row["points"] == [[500, 0.4], [700, 0.5]]
            assert (row["lossy"]["latency_s"], row["lossy"]["points"]) == (0.1, [[900, 0.2]])
            assert row["lossy"]["crossover_tokens"] is not None
            view = here.fleet.snapshot([], None).decode[int(name[-1])].tiers[0]
            assert (view.curve.latency_s, view.lossy) == (0.3, LinkCurve(0.1, 1e-9))
        quiet = curves_of(here.fleet)["tiers"]["decode-0"]["vault"]
        assert "points" not in {*quiet, *quiet["lossy"]}
        assert (
            _samples(CurveMetrics(here.fleet))["breakeven_link_latency_seconds", "vault", "nixl"]
            == 0.3
        )


async def test_what_blocks_cost_that_others_lend_is_told() -> None:
    """Of each replica that lends."""
    async with world(decode=1, costs=replace(COSTS, host_blocks=64, lends=True)) as here:
        seen = ((500, 0.4),)
        _load(here, "decode-0", peer=FetchLoad(0.7, 1e-9, 9, seen))
        row = curves_of(here.fleet, points=True)["tiers"]["decode-0"]["peer"]
        assert (row["latency_s"], row["samples"], row["points"]) == (0.7, 9, [[500, 0.4]])
        assert "peer" in {
            kind for name, kind, *_ in _samples(CurveMetrics(here.fleet)) if "link" in name
        }


async def test_a_replica_that_starts_begins_with_what_those_like_it_knew() -> None:
    """With its predecessor's curves of tiers, which are kept for the next cluster, too."""
    costs = replace(COSTS, host_blocks=64, lends=True)
    async with world(decode=2, costs=costs, hardware="cpu") as here:
        host, peer = TierLoad(9, 0, 0.001, 2e-10, 12), FetchLoad(0.002, 3e-10, 12)
        _load(here, "decode-0", tiers={Tier.HOST: host}, peer=peer)
        kept = here.fleet.book().tiers
        assert sorted(kept.values(), key=lambda link: link.latency_s) == [
            KeptLink(0.001, 2e-10, 12),
            KeptLink(0.002, 3e-10, 12),
        ]
        here.engine("decode-0").crash()
        here.start("decode-0", Role.DECODE, epoch="2", hardware="cpu")
        await here.warmed()
        for row in here.fleet.snapshot([], None).decode:
            assert row.tiers[0].curve == LinkCurve(0.001, 2e-10)
            assert row.peer == LinkCurve(0.002, 3e-10)
        told = curves_of(here.fleet)["tiers"]["decode-0"]
        assert (told["host"]["latency_s"], told["peer"]["latency_s"]) == (0.001, 0.002)


async def test_targets_are_those_that_answer_prometheus() -> None:
    """A replica without an endpoint is left out."""
    async with world() as here:
        member = here.fleet.member("decode-0")
        assert member is not None
        member.replica = msgspec.structs.replace(member.replica, metrics_address="10.0.0.7:9464")
        [target] = targets_of(here.fleet.members())
        assert target.targets == ["10.0.0.7:9464"]
        assert target.labels == {"role": "decode", "replica": "decode-0"}
