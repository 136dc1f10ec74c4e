"""`ray job submit` onto a Ray cluster that has Ray and nothing else: the job's runtime environment
brings the packages, as the documentation says, and the checkout comes with the job."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.chart import ROOT
from tests.flow.plain_engine import greedy
from tests.waiting import await_that

pytestmark = [pytest.mark.engine, pytest.mark.deploy]
LOCK = "requirements/cpu.txt"
PROMPT = [100 + 7 * n for n in range(200)]
ANSWER_TOKENS = 12
# Packages of several GB are fetched and unpacked first.
INSTALL_S, READY_S = 400.0, 450.0


@dataclass(frozen=True)
class BareRay:
    """A Ray node whose Python has no package of ours, on loopback."""

    python: Path
    dashboard: str
    env: dict[str, str]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, from the checkout."""
        said = [self.python.with_name("ray"), "job", words[0], f"--address={self.dashboard}"]
        return subprocess.run(
            [*said, *words[1:]], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120
        )


def _locked(name: str) -> str:
    lines = (ROOT / LOCK).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.startswith(f"{name}=="))


@pytest.fixture(scope="module")
def ray(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[BareRay]:
    """A virtual environment with the locked Ray, and a node that it started."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    wanted = _locked("ray").replace("ray==", "ray[default,serve]==")
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
    subprocess.run([*words, "--constraint", ROOT / LOCK], check=True, timeout=INSTALL_S)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{python.parent}:{env['PATH']}"}
    port, dashboard = free_port(), free_port()
    start = [python.with_name("ray"), "start", "--head", "--block", "--num-cpus=16"]
    start += ["--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"]
    start += [f"--dashboard-port={dashboard}", "--object-store-memory=100000000"]
    temp = Path(f"/tmp/bare-ray-{os.getpid()}")  # sockets' paths are short
    start += [f"--temp-dir={temp}"]
    with (folder / "ray.log").open("w") as log:
        node = subprocess.Popen(start, env=env, stdout=log, stderr=log)
    try:
        made = BareRay(python, f"http://127.0.0.1:{dashboard}", env)
        await_that(lambda: made.command("list").returncode == 0, "its dashboard answers", 60.0, 1.0)
        yield made
    finally:
        node.terminate()
        node.wait(60)
        shutil.rmtree(temp, ignore_errors=True)


def test_a_job_brings_its_packages(
    ray: BareRay, tiny_model: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """It serves what a plain engine would, out of the environment that Ray made for it."""
    probe = [ray.python, "-c", "import vllm"]
    assert subprocess.run(probe, capture_output=True, cwd=tmp_path, check=False).returncode == 1
    port = free_port()
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "cpu.yaml").read_text())
    config |= {"model": str(tiny_model), "ray": {"address": "auto"}}
    config["ingress"] |= {"port": port}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    brings = {"pip": LOCK, "env_vars": {"PIP_NO_DEPS": "1", "BREAKEVEN_CACHE": str(tmp_path)}}
    words = ("--working-dir", ".", "--submission-id", "bare", "--no-wait")
    serve = ("python", "-m", "cluster", "serve", "--config", str(tmp_path / "config.yaml"))
    done = ray.command("submit", *words, "--runtime-env-json", json.dumps(brings), "--", *serve)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        _await_ready(ray)
        url = f"http://127.0.0.1:{port}"
        body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": ANSWER_TOKENS}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        rows = httpx.get(f"{url}/admin/replicas").raise_for_status().json()["replicas"]
        for row in rows:
            assert "/runtime_resources/pip/" in Path(f"/proc/{row['pid']}/maps").read_text()
    finally:
        ray.command("stop", "bare")
    plain = greedy(tiny_model, [{"ids": PROMPT, "n": ANSWER_TOKENS}])
    assert [answer.json()["choices"][0]["token_ids"]] == plain


def _await_ready(ray: BareRay) -> None:
    deadline = time.monotonic() + READY_S
    while "ready http" not in (said := ray.command("logs", "bare").stdout):
        status = ray.command("status", "bare").stdout
        assert "failed" not in status, said + status
        assert time.monotonic() < deadline, said + status
        time.sleep(2.0)
