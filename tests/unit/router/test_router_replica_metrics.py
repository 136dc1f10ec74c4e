"""What an ingress tells of each replica."""

from types import SimpleNamespace
from typing import Any

import pytest

from router.member import Member
from router.replica_metrics import ReplicaMetrics
from workers.messages import Load, Role
from workers.sim import SimCosts, sim_replica


@pytest.mark.parametrize(
    ("lanes", "fallbacks"),
    [
        (("tcp/eth0",), 1),
        (("tcp/eth0", "cuda_ipc/cuda"), 1),
        (("cuda_copy/cuda", "tcp/eth0"), 1),
        (("gdr_copy/cuda", "cuda_copy/cuda", "cma/memory", "tcp/eth0"), 1),
        (("rc_mlx5/mlx5_0:1", "tcp/eth0", "cuda_ipc/cuda"), 0),
        (("cuda_ipc/cuda", "cuda_copy/cuda"), 0),
    ],
)
def test_gpus_of_one_node_hide_no_fallback(lanes: tuple[str, ...], fallbacks: int) -> None:
    """What copies within a node says nothing of what crosses to another one."""
    replica = sim_replica("decode-0", Role.DECODE, SimCosts(), rdma=True)
    nobody: Any = None
    member = Member(replica, lambda _: nobody, nobody, lambda: 0.0)
    member.load = Load(lanes=lanes)
    fleet: Any = SimpleNamespace(members=lambda: (member,))
    told = {metric.name: metric.samples[0].value for metric in ReplicaMetrics(fleet).collect()}
    assert told["breakeven_rdma_fallbacks"] == fallbacks
