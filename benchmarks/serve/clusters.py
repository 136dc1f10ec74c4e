"""The servers that are compared: clusters of ours, and the plain vLLM API server.

Each runs as its users run it, in processes of its own. Two may be up at once; the one that is not
being measured is stopped by signal, so that what it does at rest is not the other's burden.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.models import model
from benchmarks.processes import family, pause, send
from benchmarks.result import ROOT
from cluster.config import load

READY_S = 240.0
# After a pause: what stood still has been missed (3 s), met anew and caught up.
SETTLE_S = 6.0
# Of a cluster that is ready: what its start left behind has calmed down.
CALM_S = 3.0
_DRAIN_S = 5.0


@dataclass(frozen=True)
class Server:
    """A running server; `process` is the root of all of its processes."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    # The path that answers 200 once requests would be served.
    ready: str

    def processes(self) -> list[psutil.Process]:
        return family(self.process.pid)

    def frontends(self) -> list[psutil.Process]:
        """The processes that take HTTP: those that listen at the server's port."""
        port = int(self.url.rsplit(":", 1)[1])
        return [process for process in self.processes() if _listens(process, port)]

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """All of its processes stand still meanwhile."""
        return pause(self.processes())

    def rested(self) -> None:
        """Return once it serves again after a pause: what stood still meets anew."""
        time.sleep(SETTLE_S)
        _await(self, self.url + self.ready)


def cpu_s(processes: list[psutil.Process]) -> float:
    """CPU seconds that these have taken since they started."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def go_by(server: Server, policy: str) -> None:
    """Have a running cluster of one ingress route by another policy."""
    order = urllib.request.Request(
        f"{server.url}/admin/policy",
        json.dumps({"policy": policy}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(order, timeout=10) as answer:
        in_force = json.load(answer)["policy"]
    if in_force != policy:
        raise RuntimeError(f"{server.name}: {in_force} is in force, {policy} was ordered")


@contextlib.contextmanager
def ours(
    name: str, port: int, overrides: Mapping[str, Any], quick: bool = False
) -> Iterator[Server]:
    """A cluster of ours; `overrides` are sections of its configuration file."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cache_folder = Path(folder) / "cache"
        cache_folder.mkdir()
        (cache_folder / "models").symlink_to(model(quick).parent)
        config = Path(folder) / "config.yaml"
        sections = {**overrides, "model": str(model(quick))}
        sections["ingress"] = {"drain_s": _DRAIN_S, **sections.get("ingress", {}), "port": port}
        config.write_text(yaml.safe_dump(sections))
        command = [sys.executable, "-m", "cluster", "serve", "--config", str(config)]
        env = {**os.environ, "BREAKEVEN_CACHE": str(cache_folder)}
        with _running(name, command, env, port, Path(folder) / "log") as server:
            try:
                yield server
            finally:
                _end(server.process)
                down = [sys.executable, "-m", "cluster", "down"]
                subprocess.run(down, cwd=ROOT, env=env, capture_output=True, check=False)


@contextlib.contextmanager
def plain(port: int, quick: bool = False) -> Iterator[Server]:
    """vLLM's API server over one engine, with the options and environment of our engines."""
    # Imports Ray, which takes seconds.
    from cluster.app import engine_options, environment

    config = load(None, {})
    options = engine_options(config, config.decode)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model(quick)), "--served-model-name", *config.served_names]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-prefix-caching", "--prefix-caching-hash-algo", "sha256_cbor"]
    # A line of log a request would be its cost and not ours.
    command += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    command += [word for option, value in options.items() for word in _words(option, value)]
    ours_only = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CONFIGURE_LOGGING")
    told = environment(config, model(quick), 1)
    env = {**os.environ, **{k: v for k, v in told.items() if k not in ours_only}}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        _running("plain", command, env, port, Path(folder) / "log") as server,
    ):
        try:
            yield server
        finally:
            _end(server.process)


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


@contextlib.contextmanager
def _running(
    name: str, command: list[str], env: dict[str, str], port: int, log: Path
) -> Iterator[Server]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
    ready = "/readyz" if "cluster" in command else "/health"
    server = Server(name, process, f"http://127.0.0.1:{port}", log, ready)
    began_s = time.monotonic()
    print(f"    {name}: starting", flush=True)
    try:
        _await(server, server.url + ready)
        print(f"    {name}: ready in {time.monotonic() - began_s:.0f} s", flush=True)
        time.sleep(CALM_S)
    except BaseException:
        _end(process)
        raise
    yield server


def _await(server: Server, url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while not _answers(url):
        if server.process.poll() is not None or time.monotonic() > deadline_s:
            tail = server.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{server.name}: no answer at {url}\n{tail}")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        below = root.children(recursive=True)
        send([root, *below], signal.SIGCONT)
        root.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        send([root, *below], signal.SIGKILL)
        psutil.wait_procs(below, timeout=10)
    process.wait(10)


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        sockets = process.net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)
