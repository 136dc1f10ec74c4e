"""The systems that the anchor compares: our cluster, and Ray Serve LLM's prefill/decode app.

All serve the same model with the same vLLM options and environment, one prefill and one decode
replica on one core's threads each. What has to differ:

- Ray Serve LLM runs an engine as three processes (replica, EngineCore, Worker): its CPU path
  forces vLLM's `mp` executor. Ours runs it in one, with VLLM_ENABLE_V1_MULTIPROCESSING=0.
- Its connector is `kv_both` on both sides, as its guide says; ours is producer and consumer.
- `documented` is its guide's configuration. `tuned` adds what we found to help it here: NIXL's
  progress thread sleeps 1 ms between polls as in our engines, and tokens are streamed at once
  instead of every 50 ms (`stream_batching_interval_ms: 0`).
- Both systems' Ray keeps no idle workers; our HTTP goes straight to the ingress, theirs through
  Serve's proxy and its OpenAI ingress, which is how it serves.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster import app, config, local_ray, state  # noqa: E402
from cluster.model import ensure_default_model  # noqa: E402

HERE = Path(__file__).parent / "anchor_venv"
MODEL = "smollm2"
READY_S = 300.0
# Of the environment of our engines, what is about our own way to run vLLM.
OURS_ONLY = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES")
# As cluster/local_ray.py sets it for our Ray.
RAY_ENV = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class System:
    """A running system; `ready_s` is from its command to its first answered completion."""

    name: str
    url: str
    pid: int
    ready_s: float

    def prefill(self) -> list[psutil.Process]:
        """The processes of the only prefill replica: empty while it is gone."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = process.cmdline()[:1]
                if title and re.match(r"ray::ServeReplica:\w+:[Pp]refill", title[0]):
                    found += [process, *process.children(recursive=True)]
        return found

    def plans(self) -> dict[str, float]:
        """How many requests our router sent where; nothing of the other system's."""
        if self.name != "ours":
            return {}
        counts: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("breakeven_plan_total{"):
                    shape = line.split('plan="', 1)[1].split('"', 1)[0]
                    counts[shape] = counts.get(shape, 0.0) + float(line.rsplit(" ", 1)[1])
        return counts

    def prefill_is_back(self, killed: set[int]) -> bool:
        """Whether our router would use a prefill replica other than the `killed` processes."""
        with urllib.request.urlopen(f"{self.url}/admin/replicas", timeout=10) as answer:
            rows = json.load(answer)["replicas"]
        new = [r for r in rows if r["role"] == "prefill" and r["pid"] not in killed]
        return any(r["state"] == "up" and r["warmed_pairs"] for r in new)


@contextlib.contextmanager
def ours(port: int) -> Iterator[System]:
    """`serve --prefill 1 --decode 1` with the default configuration."""
    with tempfile.TemporaryDirectory(prefix="anchor-ours-") as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        (cache / "models").symlink_to((config.cache_dir() / "models").resolve())
        words = ["serve", "--prefill", "1", "--decode", "1", "--port", str(port)]
        command = [sys.executable, "-m", "cluster", *words]
        env = {**os.environ, "BREAKEVEN_CACHE": str(cache)}
        try:
            yield from _running("ours", command, port, env, "", Path(folder) / "log")
        finally:
            down = [sys.executable, "-m", "cluster", "down"]
            subprocess.run(down, cwd=ROOT, env=env, capture_output=True, check=False)


@contextlib.contextmanager
def ray_serve_llm(port: int, tuned: bool) -> Iterator[System]:
    """Ray Serve LLM's app in its own virtual environment."""
    python = ensure_venv()
    # Short: Ray's socket paths below it must stay under 107 bytes.
    folder = tempfile.mkdtemp(prefix="anchor-")
    env = {**os.environ, **RAY_ENV}
    if tuned:
        env["PYTHONPATH"] = str(HERE / "patch")
    name = "tuned" if tuned else "documented"
    command, log = [str(python), str(HERE / "app.py")], Path(folder) / "log"
    try:
        text = json.dumps(spec(port, f"{folder}/ray", tuned))
        yield from _running(name, command, port, env, text, log)
    finally:
        local_ray.end(state.leftovers(folder))
        shutil.rmtree(folder, ignore_errors=True)


def spec(port: int, folder: str, tuned: bool) -> dict[str, Any]:
    """What the app serves: our default configuration, in Ray Serve LLM's terms."""
    wanted = config.load(None, {})
    model = ensure_default_model(config.cache_dir())
    env = app.environment(wanted, model, 1)
    env = {name: value for name, value in env.items() if name not in OURS_ONLY}
    # As workers/connector.py: UCX's TCP on loopback only.
    env["UCX_NET_DEVICES"] = "lo"
    if tuned:
        env["PYTHONPATH"] = str(HERE / "patch")
    engine = app.engine_options(wanted, None)
    # Ray Serve LLM sets it to `mp` on CPUs whatever is asked.
    engine.pop("distributed_executor_backend", None)
    return {
        "model": str(model),
        "name": MODEL,
        "port": port,
        "engine": engine,
        "prefill_engine": wanted.prefill.engine,
        "decode_engine": wanted.decode.engine,
        "env": env,
        "transfer": {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_buffer_device": wanted.device,
        },
        "experimental": {"stream_batching_interval_ms": 0} if tuned else {},
        "folder": folder,
        "object_store_bytes": wanted.ray.object_store_bytes,
    }


def ensure_venv() -> Path:
    """The anchor's Python, made on the first call."""
    script = HERE / "make_venv.py"
    venv = config.cache_dir() / "anchor-venv"
    subprocess.run([sys.executable, str(script), "--venv", str(venv)], check=True)
    return venv / "bin" / "python"


def _running(
    name: str, command: list[str], port: int, env: dict[str, str], text: str, log: Path
) -> Iterator[System]:
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield System(name, url, process.pid, time.monotonic() - began)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            local_ray.end([psutil.Process(process.pid)])


def _answers(url: str) -> bool:
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
