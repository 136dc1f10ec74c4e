"""The NIXL side channel's port is ours from its choice until the engine binds it."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import zmq

from workers.connector import (
    device_of,
    keep_on_network,
    reserve_port,
    transfer_config,
    with_gpu,
)
from workers.messages import Role


def test_a_reserved_port_is_given_to_nobody_else() -> None:
    """While it is reserved, the system hands the port to no other socket: replicas that start
    at the same time cannot meet on one (one hung for ever when they did)."""
    reserved = [reserve_port("127.0.0.1") for _ in range(50)]
    try:
        ports = {sock.getsockname()[1] for sock in reserved}
        assert len(ports) == 50
        for _ in range(2000):
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                assert other.getsockname()[1] not in ports
    finally:
        for sock in reserved:
            sock.close()


def test_zmq_binds_a_reserved_port() -> None:
    """The engine's own listener gets the port beside the reservation, and only one does."""
    context = zmq.Context()
    with reserve_port("127.0.0.1") as reserved:
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        with context.socket(zmq.ROUTER) as first, context.socket(zmq.ROUTER) as second:
            first.bind(address)
            with pytest.raises(zmq.ZMQError):
                second.bind(address)
    context.destroy(linger=0)


@pytest.mark.parametrize("role", list(Role))
def test_a_failed_read_recomputes(role: Role) -> None:
    """A handoff that fails is recomputed by the engine and never fails the request."""
    config = transfer_config(role, "cpu", 30)
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_role"] == ("kv_producer" if role is Role.PREFILL else "kv_consumer")


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on two networks, one of whose devices has a second address, without RDMA."""
    devices = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["192.0.2.7", "fe80::1%eth0"],
        "eth1": ["10.0.0.7"],
        "eth1:0": ["10.0.0.8"],
    }
    found = {name: [SimpleNamespace(address=a) for a in at] for name, at in devices.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr("workers.connector._rdma_ports", list)
    # Set first: what the test leaves there goes with it.
    monkeypatch.setenv("UCX_NET_DEVICES", "")
    monkeypatch.delenv("UCX_NET_DEVICES")


@pytest.mark.parametrize(
    ("host", "device"),
    [("127.0.0.1", "lo"), ("10.0.0.7", "eth1"), ("10.0.0.8", "eth1"), ("fe80::1", "eth0")],
)
def test_kv_keeps_to_the_network_of_the_host(two_networks: None, host: str, device: str) -> None:
    """UCX hears of the one device that has the host's address."""
    keep_on_network(host)
    assert os.environ["UCX_NET_DEVICES"] == device


def test_an_operators_devices_stay(two_networks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says is not replaced, and an address of no device chooses none."""
    assert device_of("198.51.100.1") is None
    keep_on_network("198.51.100.1")
    assert "UCX_NET_DEVICES" not in os.environ
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1")
    keep_on_network("10.0.0.7")
    assert os.environ["UCX_NET_DEVICES"] == "mlx5_0:1"


@pytest.mark.parametrize(
    ("transports", "on_gpus"),
    [
        ("rc", "rc,cuda_copy,cuda_ipc"),
        ("tcp,cuda_copy", "tcp,cuda_copy,cuda_ipc"),
        ("rc,cuda", "rc,cuda"),
        ("all", "all"),
        ("^tcp", "^tcp"),
        (None, None),
    ],
)
def test_a_list_of_transports_can_move_gpu_memory(
    transports: str | None, on_gpus: str | None
) -> None:
    """What leaves nothing out stays as it is, and so does everything on CPUs."""
    assert with_gpu(transports, "cuda") == on_gpus
    assert with_gpu(transports, "cpu") == transports
