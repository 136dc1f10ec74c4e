"""Which transports UCX chose to move KV by, read from UCX's own log.

NIXL's API does not tell. With UCX_PROTO_INFO=y UCX logs a table for each operation of each
endpoint that it configures; KV moves by `ucp_get` from another process, so the rows of those
tables name the lanes: `| 0..inf | zero-copy | cma/memory |`, `rc_mlx5/mlx5_0:1`, `tcp/eth0`.
"""

import ctypes
import re
from pathlib import Path

_ENDPOINT = re.compile(r"\|\s.*\b(?P<kind>self|intra-node|inter-node) cfg#\d+")
_ROW = re.compile(r"\|\s*\S+\s*\|[^|]*\|(?P<config>[^|]*)\|\s*$")
_LANE = re.compile(r"(?P<lane>[a-z0-9_]+/[\w.:-]+)")
# UCX's names of RDMA transports.
_RDMA = frozenset({"rc", "rc_mlx5", "rc_verbs", "dc", "dc_mlx5", "ud", "ud_mlx5", "ud_verbs"})


def parse(log: str) -> tuple[str, ...]:
    """Distinct `transport/device` lanes of reads from other processes, as they first appear.

    Endpoints of an agent to itself are left out: they move no KV between replicas.
    """
    lanes: dict[str, None] = {}
    remote = reading = False
    for line in log.splitlines():
        endpoint = _ENDPOINT.search(line)
        if endpoint is not None:
            remote, reading = endpoint["kind"] != "self", False
        elif "remote memory read by ucp_get" in line:
            reading = remote
        elif reading:
            row = _ROW.search(line)
            found = _LANE.findall(row["config"]) if row else []
            lanes.update((lane, None) for lane in found)
    return tuple(lanes)


def read(path: Path) -> tuple[str, ...]:
    """The lanes in this process's UCX log; none while the file does not exist.

    UCX writes through a fully buffered C stream, so what it wrote is flushed first.
    """
    ctypes.CDLL(None).fflush(None)
    try:
        return parse(path.read_text(errors="replace"))
    except FileNotFoundError:
        return ()


def has_rdma() -> bool:
    """Whether this machine has an RDMA device that processes may use."""
    return any(Path("/dev/infiniband").glob("uverbs*"))


def is_rdma(lane: str) -> bool:
    """Whether a lane such as `rc_mlx5/mlx5_0:1` is RDMA."""
    return lane.split("/", 1)[0] in _RDMA
