"""The NIXL side channel's port is ours from its choice until the engine binds it."""

import socket

import pytest
import zmq

from workers.connector import reserve_port, transfer_config
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
