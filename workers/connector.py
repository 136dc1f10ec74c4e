"""How an engine's KV leaves and arrives: NIXL's configuration, ours in one place.

NIXL and UCX read the process environment when they load, so `prepare` must run before vLLM is
imported. Everything here works the same on a GPU; only the buffer device differs.
"""

import importlib
import math
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from workers.messages import Role

# NIXL's Python API hard-codes a progress-thread delay of 0, which makes an idle agent spin a
# whole core (measured: 1.04 cores, against 0.05 at 1,000 us; prefill 3x slower with two spinning).
PROGRESS_DELAY_US = 1000
_CUDA = ("cuda_copy", "cuda_ipc")
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def prepare(host: str, ucx_log: Path, transports: str | None) -> socket.socket:
    """Set NIXL's and UCX's environment for this process; returns the reserved side channel,
    to be kept as long as the engine.

    `transports` is UCX_TLS (None leaves the choice to UCX). UCX writes the lanes it chose to
    `ucx_log`, which `workers.lanes` reads.
    """
    reserved = reserve_port(host)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(reserved.getsockname()[1])
    os.environ["UCX_PROTO_INFO"] = "y"
    os.environ["UCX_LOG_FILE"] = str(ucx_log)
    if transports:
        os.environ["UCX_TLS"] = transports
    keep_on_network(host)
    return reserved


def with_gpu(transports: str | None, device: str) -> str | None:
    """UCX_TLS for engines on this device. A list that names what may be used leaves out the rest,
    and on GPUs nothing moves without `cuda_copy` and, on one node, `cuda_ipc`."""
    if device != "cuda" or transports is None or transports.startswith("^"):
        return transports
    named = transports.split(",")
    # `cuda` stands for both, and `all` for everything.
    if "all" in named or "cuda" in named:
        return transports
    return ",".join([*named, *(each for each in _CUDA if each not in named)])


def keep_on_network(host: str) -> None:
    """Have UCX's TCP use the network of `host` alone: it listens on every one otherwise, without
    asking who comes. RDMA ports are used as well. What the environment says is left as it is."""
    device = "lo" if host in LOOPBACK else device_of(host)
    if device is not None:
        os.environ.setdefault("UCX_NET_DEVICES", ",".join([device, *_rdma_ports()]))


def device_of(address: str) -> str | None:
    """The network device of this machine that has an address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        # A link-local address names its device behind %, a device's second address itself behind :.
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name.partition(":")[0]
    return None


def calm_progress_thread(delay_us: int = PROGRESS_DELAY_US) -> None:
    """Make NIXL agents of this process sleep between polls instead of spinning.

    Replaces the config class that `nixl_agent` instantiates by one whose `pthrDelay` keeps our
    value: upstream offers no parameter for it (nixl 1.5.1, `_api.py`).
    """
    api: Any = importlib.import_module("nixl._api")
    bindings = api.nixlBind

    class CalmConfig(bindings.nixlAgentConfig):  # type: ignore[name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, delay_us if name == "pthrDelay" else value)

    class CalmBindings:
        nixlAgentConfig = CalmConfig

        def __getattr__(self, name: str) -> Any:
            return getattr(bindings, name)

    api.nixlBind = CalmBindings()


def transfer_config(role: Role, device: str, lease_s: int) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` of one replica.

    A failed read recomputes (`recompute`) instead of failing the request. `lease_s` bounds how
    long a finished prefill's blocks wait for a decode replica that never comes.
    """
    return {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if role is Role.PREFILL else "kv_consumer",
        "kv_buffer_device": device,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": lease_s},
    }


def lease_s(transfer: Any) -> float:
    """How long a finished prefill waits to be read, of a vLLM config's `kv_transfer_config`."""
    return float(transfer.get_from_extra_config("kv_lease_duration", 0)) if transfer else 0.0


def trusted_s(transfer: Any) -> float:
    """How long an engine may stand still before a lease on the KV that it reads may have ended: a
    heartbeat goes out each sixth of a lease and prolongs it by two thirds of one (vLLM 0.32)."""
    if transfer is None:
        return math.inf
    return float(transfer.get_from_extra_config("kv_lease_duration", 30)) / 2


# What a prefill is asked, so that its blocks stay for a decode replica to read.
KEEP_FOR_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def _rdma_ports() -> list[str]:
    """UCX's names of this machine's RDMA ports, such as `mlx5_0:1`."""
    ports = Path("/sys/class/infiniband").glob("*/ports/*")
    return sorted(f"{port.parent.parent.name}:{port.name}" for port in ports)


def reserve_port(host: str) -> socket.socket:
    """A free port that stays ours until the returned socket is closed.

    vLLM binds the port tens of seconds after it is chosen, on a thread whose failure it waits
    for without end. A bound socket that does not listen keeps every other process from being
    given the port, and SO_REUSEADDR lets ZMQ, which sets it too, bind it beside us (Linux).
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    return reserved
