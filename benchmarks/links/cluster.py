"""A cluster of ours over two Ray nodes with a shaped link between them.

The near node has Ray's head, `breakeven serve`, and with it ingress and catalogue; the far one has
what the configuration places there by the resource `far` (`near` is the other's). Both are of this
machine, each with a network, a /dev/shm and a process table of its own.
"""

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import yaml

from benchmarks.links.network import Link, Shape, joined
from benchmarks.links.node import Node, inner, node

_RAY = Path(sys.executable).with_name("ray")
_GCS_PORT, _HTTP_PORT = 6379, 8000
# Plenty: where things run is told by name, not by counting.
_RESOURCES = 1000
_CPUS = 16
_STORE_BYTES = 100_000_000
_NODE_S, READY_S, _END_S = 60.0, 240.0, 60.0
_LOOK_S = 0.2
# A catalogue and a replica tell what is cached this often, with some time to spare.
_BEATS_S, _RESET_S = 1.2, 30.0
# Beats and Ray's own words are less than this between two looks; blocks are more.
_QUIET_BYTES, _QUIET_LOOK_S, _QUIET_S = 100_000, 0.5, 300.0
# As `cluster.local_ray` sets them where it starts Ray.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@dataclass(frozen=True, slots=True)
class LinkedCluster:
    """A cluster that serves. Its ingress is reached from the near node's network alone."""

    link: Link
    near: Node
    far: Node
    folder: Path
    together: bool = False
    url: str = f"http://127.0.0.1:{_HTTP_PORT}"

    def get(self, path: str) -> Any:
        """The JSON that it answers."""
        with self.near.network(), urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON that it answers to this JSON."""
        told = {"content-type": "application/json", **(headers or {})}
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), told)
        with self.near.network(), urllib.request.urlopen(asked, timeout=600) as answer:
            return json.load(answer)

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Rows of /admin/replicas by name."""
        return {row["name"]: row for row in self.get("/admin/replicas")["replicas"]}

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        with self.near.network(), urllib.request.urlopen(self.url + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def await_quiet(self) -> None:
        """Return once the link carries next to nothing: what was being stored is on the other side.
        Raises RuntimeError where that does not come."""
        deadline_s, before = time.monotonic() + _QUIET_S, -_QUIET_BYTES
        while (now := self._carried_bytes()) - before >= _QUIET_BYTES:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the link was not quiet within {_QUIET_S:g} s")
            before = now
            time.sleep(_QUIET_LOOK_S)

    def settle(self, *names: str) -> None:
        """Both: these replicas cache nothing, and the link carries next to nothing."""
        before = self._carried_bytes()
        self.reset(*names)
        if self._carried_bytes() - before >= _QUIET_BYTES:
            self.await_quiet()

    def _carried_bytes(self) -> int:
        """In both directions; on one node through its loopback."""
        device = "lo" if self.together else self.near.end.device
        with self.near.network():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        [numbers] = [
            line.split(":")[1].split() for line in lines if line.strip().startswith(f"{device}:")
        ]
        return int(numbers[0]) + int(numbers[8])

    def reset(self, *names: str) -> None:
        """Have these replicas drop what they cache, and return once the catalogue knows; the vault
        keeps what it has. Raises RuntimeError where one does not."""
        deadline_s = time.monotonic() + _RESET_S
        while True:
            for name in names:
                self.post("/admin/reset", {"replica": name})
            time.sleep(_BEATS_S)
            holding = [
                row for name, row in self.replicas().items() if name in names and _holds(row)
            ]
            if not holding:
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"blocks are held on to: {holding}")


@contextlib.contextmanager
def linked(
    shape: Shape,
    sections: Mapping[str, Any],
    model: Path,
    cache: Mapping[str, Path] = MappingProxyType({}),
    together: bool = False,
) -> Iterator[LinkedCluster]:
    """A cluster by these sections of its configuration file, until the block ends.

    Files of `cache` lie in its cache folder by these names. `together` has everything on the near
    node, where shared memory is the way between processes. Raises `LinkRefusedError` where this
    machine cannot make links.
    """
    with ray_nodes(shape, together) as nodes:
        folder, env = nodes.folder, dict(nodes.env)
        config = nodes.configured(sections, model)
        kept = folder / "cache"
        kept.mkdir()
        for file, path in cache.items():
            (kept / file).symlink_to(path)
        env["BREAKEVEN_CACHE"] = str(kept)
        words = [sys.executable, "-m", "cluster", "serve", "--config", str(config)]
        serving = nodes.near.start(words, folder / "serve.log", env)
        try:
            _await(lambda: "ready http" in _text(folder / "serve.log"), serving, folder, READY_S)
            yield LinkedCluster(nodes.link, nodes.near, nodes.far, folder, together)
        finally:
            _end(serving)


@dataclass(frozen=True, slots=True)
class RayNodes:
    """Ray's two nodes, before anything of ours runs there; `env` is for what is to join them."""

    link: Link
    near: Node
    far: Node
    folder: Path
    env: Mapping[str, str]

    def configured(self, sections: Mapping[str, Any], model: Path) -> Path:
        """A configuration file with these sections, for a cluster on these nodes."""
        file = self.folder / "config.yaml"
        together = self.near is self.far
        file.write_text(yaml.safe_dump(_sections(sections, self.near, model, together)))
        return file

    def start_ray(self, at: Node, words: Sequence[str], env: Mapping[str, str]) -> None:
        """One of Ray's nodes there, by these words of `ray start`, with its folder and address."""
        name = "near" if at is self.near else "far"
        _start_node(at, name, words, self.folder, {**self.env, **env})


@contextlib.contextmanager
def ray_nodes(shape: Shape, together: bool = False, dashboard: bool = False) -> Iterator[RayNodes]:
    """Ray over two nodes, until the block ends; `dashboard` runs it on the near one, which takes
    jobs. Raises as `linked`."""
    with bare_nodes(shape, together) as nodes:
        far = None if together else nodes.far
        _start_ray(nodes.near, far, nodes.folder, nodes.env, dashboard)
        yield nodes


@contextlib.contextmanager
def bare_nodes(shape: Shape, together: bool = False) -> Iterator[RayNodes]:
    """The same before Ray runs there; `RayNodes.start_ray` starts it. Raises as `linked`."""
    with contextlib.ExitStack() as made:
        folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="links-")))
        link = made.enter_context(joined(shape))
        near = made.enter_context(node(link.ends[0]))
        far = near if together else made.enter_context(node(link.ends[1]))
        env = _ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        yield RayNodes(link, near, far, folder, env)


def _holds(row: Mapping[str, Any]) -> int:
    """Blocks of its own that a replica has."""
    return int(row["cached_blocks"] + row["tiers"].get("host", {}).get("blocks", 0))


def _sections(
    sections: Mapping[str, Any], near: Node, model: Path, together: bool
) -> dict[str, Any]:
    ours = {"model": str(model), "host": "node"}
    ray = {"address": f"{near.address}:{_GCS_PORT}"}
    # Shared memory of two nodes is never one's: UCX is not to look for it.
    kv = {"transports": None if together else "tcp", **sections.get("kv", {})}
    ingress = {"drain_s": 5, **sections.get("ingress", {}), "port": _HTTP_PORT}
    return {**sections, **ours, "ray": ray, "kv": kv, "ingress": ingress}


def _start_ray(
    near: Node, far: Node | None, folder: Path, env: Mapping[str, str], dashboard: bool
) -> None:
    """Ray's nodes; the near one is the far one too where there is no other."""
    head = ["--head", f"--port={_GCS_PORT}", f"--include-dashboard={str(dashboard).lower()}"]
    head += [f"--dashboard-host={near.address}"]
    _start_node(near, "near", [*head, *_offered("near", *([] if far else ["far"]))], folder, env)
    if far is not None:
        joining = [f"--address={near.address}:{_GCS_PORT}", *_offered("far")]
        _start_node(far, "far", joining, folder, env)


def _offered(*names: str) -> list[str]:
    resources = json.dumps(dict.fromkeys(names, _RESOURCES))
    return [f"--num-cpus={_CPUS}", f"--resources={resources}"]


def _start_node(
    at: Node, name: str, more: Sequence[str], folder: Path, env: Mapping[str, str]
) -> None:
    """One, with a folder of its own."""
    own, log = folder / name, folder / f"{name}.log"
    own.mkdir()
    words = [str(_RAY), "start", "--block", f"--node-ip-address={at.address}", *more]
    words += [f"--object-store-memory={_STORE_BYTES}", f"--temp-dir={own}"]
    process = at.start(words, log, env)
    _await(lambda: "Ray runtime started" in _text(log), process, folder, _NODE_S)


def _await(
    come: Callable[[], bool], process: "subprocess.Popen[bytes]", folder: Path, within_s: float
) -> None:
    """Return once it is so; raises RuntimeError with the logs if the process ends before."""
    deadline_s = time.monotonic() + within_s
    while not come():
        if process.poll() is not None or time.monotonic() > deadline_s:
            logs = [f"{log.name}:\n{_text(log)[-3000:]}" for log in sorted(folder.glob("*.log"))]
            raise RuntimeError("\n".join(["the linked cluster did not come up", *logs]))
        time.sleep(_LOOK_S)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C; what it leaves ends with its node."""
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        inner(process).terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    process.kill()
    process.wait()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
