"""A cluster as its users run it: the `serve` command in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
READY_S = 180.0
# Of a cluster at rest: finished prefills are read and books are closed within this.
SETTLE_S = 5.0
# A catalogue tells how many blocks it knows of this often, under load a little later.
BEAT_S = 0.5
# Until Serve has started a dead engine anew, and its pairs are warmed.
BACK_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """A running `serve`; `cache` holds its state file, `admin_key` opens /admin where one must."""

    process: subprocess.Popen[str]
    url: str
    cache: Path
    output: Path
    admin_key: str = "none"

    def get(self, path: str) -> Any:
        key = os.environ.get("BREAKEVEN_ADMIN_KEY", self.admin_key)
        headers = {"authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def replicas(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.get("/admin/replicas")["replicas"]}

    def total(self, field: str) -> int:
        """A field of all replicas, summed."""
        return sum(int(row[field]) for row in self.replicas().values())

    def cached_blocks(self) -> int:
        """Blocks that the catalogue knows of, once it has told the ingress of the last change."""
        time.sleep(2 * BEAT_S)
        return self.total("cached_blocks")

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def pool(self, role: str) -> list[dict[str, Any]]:
        """The replicas of one pool."""
        return [row for row in self.replicas().values() if row["role"] == role]

    def await_back(self, role: str, count: int, dead: Collection[int], pairs: int = 1) -> None:
        """Return once Serve has replaced what died, and each replica has so many warm pairs."""
        deadline = time.monotonic() + BACK_S
        while True:
            rows = [r for r in self.pool(role) if r["pid"] not in dead]
            if len([r for r in rows if r["state"] == "up" and r["warmed_pairs"] >= pairs]) >= count:
                return
            assert time.monotonic() < deadline, rows
            time.sleep(0.25)

    def run_dir(self) -> Path:
        return Path(json.loads((self.cache / "cluster.json").read_text())["run_dir"])

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another `breakeven` command against this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "cluster", *words],
            cwd=ROOT,
            env=_environment(self.cache),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def await_rest(self, timeout_s: float = SETTLE_S) -> None:
        """Return once the books balance: nothing runs, waits, is leased or holds pages."""
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self.replicas().values()
            held = [(r["name"], k, r[k]) for r in rows for k in _HELD if r[k]]
            if not held:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"still held after {timeout_s} s: {held}")
            time.sleep(0.05)


_HELD = ("running", "waiting", "pending_prefill_tokens", "leased", "kv_usage")


@contextlib.contextmanager
def running(tmp: Path, models: Path, port: int, *words: str) -> Iterator[Cluster]:
    """A cluster that is ready; ended by SIGTERM, and by `down` should that fail."""
    cluster = start(tmp, models, port, *words)
    try:
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                cluster.process.wait(60)
        cluster.command("down")


def _unexplored(tmp: Path, words: Sequence[str]) -> tuple[str, ...]:
    """The same words, with a config by which the plan is the cheapest unless the test's says
    otherwise: one request in a hundred would be planned by chance."""
    left, config = list(words), tmp / "unexplored.yaml"
    made: dict[str, Any] = {}
    if "--config" in left:
        at = left.index("--config")
        made = yaml.safe_load(Path(left[at + 1]).read_text())
        del left[at : at + 2]
    config.write_text(yaml.safe_dump({**made, "router": {"explore": 0, **made.get("router", {})}}))
    return (*left, "--config", str(config))


def start(tmp: Path, models: Path, port: int, *words: str, scheme: str = "http") -> Cluster:
    """Start `serve` and wait for its `ready` line."""
    cache = tmp / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "models").symlink_to(models.resolve())
    output = tmp / "serve.log"
    words = _unexplored(tmp, words)
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve", "--port", str(port), *words],
            cwd=ROOT,
            env=_environment(cache),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    cluster = Cluster(process, f"{scheme}://127.0.0.1:{port}", cache, output)
    deadline = time.monotonic() + READY_S
    while f"ready {cluster.url}" not in output.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            cluster.command("down")
            raise AssertionError(f"no ready line:\n{output.read_text()}")
        time.sleep(0.2)
    return cluster


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "BREAKEVEN_CACHE": str(cache)}
