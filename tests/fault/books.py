"""What a cluster holds of its machine, to be the same after a fault as before it.

Pages, leases and requests are in `/admin/replicas`; shared memory, descriptors and dead children
are the kernel's to tell. Asyncio tasks cannot be seen from outside a process; the simulated tests
(tests/sim) check that none is left.
"""

import os
import time
from dataclasses import dataclass

import psutil

from tests.fault.faults import LEASE_S
from tests.flow.cluster_process import Cluster

# The blocks of a dead reader wait for the end of their lease, which its heartbeats have prolonged.
REST_S = 2.0 * LEASE_S
# Connections that come and go: HTTP, Ray's own, the sockets of a NIXL peer that is being dropped.
SLACK = 24


@dataclass(frozen=True)
class Books:
    """A cluster at rest: descriptors by kind of process, names in /dev/shm."""

    descriptors: dict[str, int]
    segments: frozenset[str]

    @classmethod
    def of(cls, cluster: Cluster) -> "Books":
        return cls(descriptors(cluster), frozenset(os.listdir("/dev/shm")))

    def check(self, cluster: Cluster) -> None:
        """Raise AssertionError unless the cluster comes to rest with nothing more than this."""
        cluster.await_rest(REST_S)
        deadline = time.monotonic() + REST_S
        while wrong := self._wrong(cluster):
            assert time.monotonic() < deadline, wrong
            time.sleep(0.25)

    def _wrong(self, cluster: Cluster) -> list[str]:
        now = descriptors(cluster)
        wrong = [
            f"{name}: {count} descriptors, {self.descriptors[name]} before"
            for name, count in now.items()
            if count > self.descriptors[name] + SLACK
        ]
        wrong += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self.segments]
        return wrong + zombies(cluster)


def processes(cluster: Cluster) -> dict[str, list[int]]:
    """Pids by kind: ingress, catalogue, prefill, decode."""
    found: dict[str, list[int]] = {"ingress": ingresses(cluster)}
    report = cluster.get("/admin/replicas")
    if report["catalogue"]["pid"]:
        found["catalogue"] = [report["catalogue"]["pid"]]
    for row in report["replicas"]:
        found.setdefault(row["role"], []).append(row["pid"])
    return found


def ingresses(cluster: Cluster) -> list[int]:
    """Pids of those that listen on the cluster's HTTP port."""
    port = int(cluster.url.rsplit(":", 1)[1])
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    return sorted({c.pid for c in listening if c.laddr.port == port and c.pid is not None})


def descriptors(cluster: Cluster) -> dict[str, int]:
    """The most open descriptors of a process of each kind."""
    counts = {}
    for kind, pids in processes(cluster).items():
        alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        counts[kind] = max((process.num_fds() for process in alive), default=0)
    return counts


def zombies(cluster: Cluster) -> list[str]:
    """Dead children of the cluster that nobody has waited for."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    return [f"zombie {p.pid}" for p in family if _is_zombie(p)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
