"""Starting and ending: one command each, and no trace afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.flow.cluster_process import Cluster, start

pytestmark = pytest.mark.real_model


def _traces(cluster: Cluster, run_dir: Path, segments: set[str]) -> list[str]:
    """What a cluster left: processes, port, run folder, state file, shared memory."""
    left = [
        f"process {process.pid} {process.name()}"
        for process in psutil.process_iter()
        if _opens(process.pid, str(run_dir))
    ]
    port = int(cluster.url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            left.append(f"port {port}")
    left += [f"folder {run_dir}"] if run_dir.exists() else []
    left += ["state file"] if (cluster.cache / "cluster.json").exists() else []
    return left + [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - segments]


def _opens(pid: int, folder: str) -> bool:
    try:
        links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.startswith(folder) for link in links)


@pytest.fixture
def started(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> Callable[[], tuple[Cluster, Path, set[str]]]:
    def begin() -> tuple[Cluster, Path, set[str]]:
        segments = set(os.listdir("/dev/shm"))
        words = ("--model", str(tiny_model), "--engine-arg", "kv_cache_memory_bytes=67108864")
        cluster = start(tmp_path, tiny_model.parent, free_port(), *words)
        return cluster, cluster.run_dir(), segments

    return begin


def test_ctrl_c_drains_and_leaves_no_trace(
    started: Callable[[], tuple[Cluster, Path, set[str]]],
) -> None:
    """SIGINT to the foreground group lets a running stream finish, refuses new connections,
    and leaves no process, port, folder or shared memory."""
    cluster, run_dir, segments = started()
    body = {
        "model": "smollm2",
        "prompt": [5, 6, 7],
        "max_tokens": 600,
        "stream": True,
        "ignore_eos": True,
    }
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        os.killpg(cluster.process.pid, signal.SIGINT)
        rest = [line for line in lines if line.startswith("data: {")]
    assert json.loads(rest[-1][6:])["choices"][0]["finish_reason"] == "length"
    assert cluster.process.wait(60) == 0
    assert _traces(cluster, run_dir, segments) == []
    assert cluster.output.read_text().splitlines()[-1] == "stopped"


def test_nothing_listens_beyond_loopback(
    started: Callable[[], tuple[Cluster, Path, set[str]]],
) -> None:
    """Every socket of every process of a default cluster is bound to loopback; status, doctor
    and a second `serve` see the running one; `down` ends it."""
    cluster, run_dir, segments = started()
    pids = {p.pid for p in psutil.process_iter() if _opens(p.pid, str(run_dir))}
    pids.add(cluster.process.pid)
    open_to_all = [
        (c.pid, c.laddr)
        for c in psutil.net_connections("tcp")
        if c.pid in pids
        and c.status == psutil.CONN_LISTEN
        and c.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    assert open_to_all == []
    status = json.loads(cluster.command("status", "--json").stdout)
    assert {row["name"] for row in status["replicas"]} == {"prefill-0", "decode-0"}
    assert all(row["state"] == "up" and row["lanes"] is not None for row in status["replicas"])
    assert cluster.command("doctor", "--json").returncode == 0
    second = cluster.command("serve")
    assert second.returncode == 1
    assert "already runs" in second.stderr
    assert cluster.command("down").returncode == 0
    assert cluster.process.wait(60) == 0
    assert _traces(cluster, run_dir, segments) == []


def test_down_clears_up_after_a_crash(
    started: Callable[[], tuple[Cluster, Path, set[str]]],
) -> None:
    """After kill -9 of the supervisor `doctor` names the crash and the remedy, and `down`
    leaves no trace."""
    cluster, run_dir, segments = started()
    cluster.process.kill()
    cluster.process.wait(10)
    doctor = cluster.command("doctor", "--json")
    assert doctor.returncode == 1
    findings = {f["subject"]: f for f in json.loads(doctor.stdout)["findings"]}
    assert findings["crashed cluster"]["remedy"] == "`breakeven down`"
    assert cluster.command("down").returncode == 0
    assert _traces(cluster, run_dir, segments) == []
    assert "no cluster is recorded" in cluster.command("down").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--engine-arg", "nonsense"), "no K=V"),
        (("--model", "/no/such/folder"), "no folder /no/such/folder"),
        (("--decode", "0"), "decode.replicas"),
        (("--prefill", "-1"), "prefill.replicas"),
        (("--port", "70000"), "ingress.port"),
        (("--host", "0.0.0.0"), "not loopback"),
        (("--config", "/no/such/file.yaml"), "/no/such/file.yaml"),
        (("--config", "{tmp}/keys.yaml"), "is no SHA-256"),
    ],
)
def test_a_wrong_option_is_refused_at_once(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    """What cannot work is refused in one sentence before anything starts."""
    (tmp_path / "bad.yaml").write_text("admin: [a-key-in-clear]")
    (tmp_path / "keys.yaml").write_text(f"ingress: {{keys_file: {tmp_path}/bad.yaml}}")
    began = time.monotonic()
    done = _serve(tmp_path, *(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("no_such_option=1", "unrecognized arguments: --no-such-option"),
        ("enable_lora=true", "set by Breakeven"),
    ],
)
def test_a_wrong_engine_option_ends_the_start(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int], option: str, says: str
) -> None:
    """vLLM refuses its own options; the cluster ends, and says why in vLLM's words."""
    words = ("--model", str(tiny_model), "--port", str(free_port()), "--engine-arg", option)
    done = _serve(tmp_path, *words)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cluster.json").exists()


def _serve(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", "serve", *words],
        env={**os.environ, "BREAKEVEN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
