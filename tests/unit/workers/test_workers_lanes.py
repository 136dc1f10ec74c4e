from pathlib import Path

import pytest

from workers.lanes import is_rdma, parse, read

STAMP = "[1795313059.494569] [vm:6017 :0]"
RULE = (
    f"{STAMP}   +--------------------------------+----------------------------------------------+"
)


def endpoint(title: str, operation: str, *rows: tuple[str, str, str]) -> str:
    """An endpoint's heading, and the table of one operation under it."""
    head = f"{STAMP}   | {title:58} |\n"
    operation_line = f"{STAMP}   | {operation} |\n"
    names = f"{STAMP}   | Range  | Description |              Config               |\n"
    body = "".join(f"{STAMP}   | {a} | {b} | {c} |\n" for a, b, c in rows)
    return f"{RULE}\n{head}{RULE}\n{operation_line}{RULE}\n{names}{RULE}\n{body}{RULE}\n"


READ = "remote memory read by ucp_get*(multi) into host memory from host"
WRITE = "remote memory write by ucp_put*(multi) from host memory to host"
CMA = ("0..inf", "zero-copy  ", "cma/memory                       ")
TCP = ("0..inf", "software emulation", "tcp/lo")


def test_a_read_from_another_process_names_its_lane() -> None:
    """The row under a read of an intra-node endpoint is the lane."""
    assert parse(endpoint("a intra-node cfg#1", READ, CMA)) == ("cma/memory",)


def test_software_emulation_names_its_lane_too() -> None:
    """A fallback over TCP shows, which is what an operator looks for."""
    assert parse(endpoint("a inter-node cfg#3", READ, TCP)) == ("tcp/lo",)


def test_an_agent_s_endpoint_to_itself_is_ignored() -> None:
    """It moves no KV between replicas."""
    assert parse(endpoint("a self cfg#0", READ, ("0..inf", "copy", "self/memory"))) == ()


def test_other_operations_are_ignored() -> None:
    """KV moves by reads alone; a write's lane would mislead."""
    assert parse(endpoint("a intra-node cfg#1", WRITE, TCP)) == ()


def test_several_lanes_are_told_apart() -> None:
    """A read striped over two devices names both, without paths and shares."""
    striped = "50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_1:1/path0"
    rows = (("0..16K", "short", "rc_mlx5/mlx5_0:1/path0"), ("16K..inf", "zero-copy", striped))
    log = endpoint("a inter-node cfg#2", READ, *rows)
    assert parse(log) == ("rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_1:1")


@pytest.mark.parametrize("lane", ["tcp/br-4f2a", "tcp/eth0.100", "cuda_ipc/cuda", "posix/memory"])
def test_a_device_keeps_its_whole_name(lane: str) -> None:
    """Bridges and VLANs have dashes and dots in their names."""
    assert parse(endpoint("a intra-node cfg#1", READ, ("0..inf", "copy", lane))) == (lane,)


def test_lanes_are_listed_once_in_order_over_a_whole_log() -> None:
    """Tables of several endpoints follow each other; a self endpoint ends a remote one."""
    log = (
        endpoint("a self cfg#0", READ, ("0..inf", "copy", "self/memory"))
        + endpoint("a intra-node cfg#1", READ, CMA)
        + endpoint("a intra-node cfg#1", WRITE, ("0..inf", "copy", "sysv/memory"))
        + endpoint("b intra-node cfg#2", READ, TCP, CMA)
        + endpoint("b self cfg#0", READ, ("0..inf", "copy", "self/memory"))
        + f"{STAMP} UCX  WARN  something else | with a bar |\n"
    )
    assert parse(log) == ("cma/memory", "tcp/lo")


def test_a_log_that_is_not_there_yet_has_no_lanes(tmp_path: Path) -> None:
    """UCX opens its log late; bytes that are no UTF-8 do not matter."""
    path = tmp_path / "ucx.log"
    assert read(path) == ()
    path.write_bytes(b"\xff\n" + endpoint("a intra-node cfg#1", READ, CMA).encode())
    assert read(path) == ("cma/memory",)


@pytest.mark.parametrize(
    ("lane", "rdma"), [("rc_mlx5/mlx5_0:1", True), ("tcp/lo", False), ("cma/memory", False)]
)
def test_rdma_is_told_by_its_transport(lane: str, rdma: bool) -> None:
    """The device's name does not matter."""
    assert is_rdma(lane) is rdma
