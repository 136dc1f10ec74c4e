"""`ray job submit` onto a Ray cluster of two nodes, from a checkout that is nowhere installed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.links.cluster import LinkedCluster, RayNodes, ray_nodes
from benchmarks.links.network import LinkRefusedError, Shape, check
from tests.flow.plain_engine import greedy
from tests.waiting import await_that

pytestmark = [pytest.mark.real_model, pytest.mark.engine, pytest.mark.deploy]
PROMPTS = [[100 + 7 * row + n * n % 20_000 for n in range(700)] for row in range(2)]
ANSWER_TOKENS, READY_S, ENDED_S = 12, 240.0, 60.0
_RAY = str(Path(sys.executable).with_name("ray"))
# Prefill on one node, decode on the other.
SECTIONS: dict[str, Any] = {
    "engine": {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 26},
    "prefill": {"replicas": 1, "resources": {"far": 1}, "surge": False},
    "decode": {"replicas": 1, "resources": {"near": 1}, "surge": False},
    "router": {"policy": "least_loaded"},
}


@dataclass(frozen=True)
class Jobs:
    """Ray's jobs of two nodes, as somebody on the near one commands them."""

    nodes: RayNodes

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, in this checkout's folder."""
        address = f"--address=http://{self.nodes.near.address}:8265"
        said = [_RAY, "job", words[0], address, *words[1:]]
        return self.nodes.near.run(said, self.nodes.env, timeout_s=120.0)

    def submit(self, name: str, config: Path, **env: str) -> None:
        """As the documentation says, but for waiting."""
        words = ("--working-dir", ".", "--submission-id", name, "--no-wait")
        runtime = ("--runtime-env-json", json.dumps({"env_vars": env}))
        serving = (sys.executable, "-m", "cluster", "serve", "--config", str(config))
        done = self.command("submit", *words, *runtime, "--", *serving)
        assert done.returncode == 0, done.stdout + done.stderr

    def logs(self, name: str) -> str:
        """What the job has printed."""
        return self.command("logs", name).stdout

    def ended(self, name: str) -> str:
        """The same, once it has failed."""
        await_that(lambda: self.failed(name), "it failed", 60.0, 1.0)
        return self.logs(name)

    def failed(self, name: str) -> bool:
        """By Ray's own words."""
        done = self.command("status", name)
        return f"'{name}' failed" in done.stdout


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Namespaces need root; what is missing is the reason."""
    try:
        check()
    except LinkRefusedError as refusal:
        pytest.skip(str(refusal))
    with ray_nodes(Shape(), dashboard=True) as nodes:
        yield Jobs(nodes)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> list[list[int]]:
    """What one plain vLLM engine answers."""
    return greedy(tiny_model, [{"ids": prompt, "n": ANSWER_TOKENS} for prompt in PROMPTS])


def _ask(cluster: LinkedCluster, prompt: list[int]) -> list[int]:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": ANSWER_TOKENS}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = cluster.post("/v1/completions", body)["choices"][0]["token_ids"]
    return tokens


def _other(nodes: RayNodes, model: Path, name: str, **sections: Any) -> Path:
    """Another configuration's file."""
    file = nodes.configured({**SECTIONS, **sections}, model)
    return file.rename(file.with_name(name))


def _changed(file: Path, **sections: Any) -> Path:
    """With other values where the nodes set them."""
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **sections}))
    return file


def test_a_cluster_that_asks_for_too_much_is_refused(jobs: Jobs, tiny_model: Path) -> None:
    """Before anything starts, with the numbers and the remedy."""
    greedy_one = {**SECTIONS["decode"], "resources": {"a100_rack": 1}}
    jobs.submit("greedy", _other(jobs.nodes, tiny_model, "greedy.yaml", decode=greedy_one))
    said = jobs.ended("greedy")
    assert "decode: 1 wanted, each with 1 CPU, 1 a100_rack, and Ray's nodes have room for 0" in said
    assert "add nodes, ask for less" in said
    assert "Traceback" not in said
    assert "1/1 up" not in said


def test_a_model_that_a_node_lacks_is_refused(jobs: Jobs, tiny_model: Path) -> None:
    """The path is where it was looked for."""
    config = _other(jobs.nodes, tiny_model, "lacking.yaml")
    jobs.submit("lacking", _changed(config, model="/no/model"))
    assert "no folder /no/model" in jobs.ended("lacking")


def test_a_job_serves_over_both_nodes(jobs: Jobs, tiny_model: Path, plain: list[list[int]]) -> None:
    """Tokens are a plain engine's, and KV crosses the link by TCP. A second job is refused while
    the first runs; what a stopped one leaves ends by itself or with the next."""
    nodes = jobs.nodes
    config = _other(nodes, tiny_model, "serve.yaml")
    _ready(jobs, "first", config)
    cluster = LinkedCluster(nodes.link, nodes.near, nodes.far, nodes.folder)
    rows = cluster.replicas()
    assert rows["decode-0"]["node"] == nodes.near.address
    assert rows["prefill-0"]["node"] == nodes.far.address
    assert [_ask(cluster, prompt) for prompt in PROMPTS] == plain
    time.sleep(1.5)  # a replica tells at least once a second
    row = cluster.replicas()["decode-0"]
    assert (row["lanes"], row["failed_transfers"]) == (["tcp/wire"], 0)
    assert row["transfer_bytes"] >= sum(map(len, PROMPTS)) // 32 * 32 * row["kv_bytes_per_token"]
    second = _changed(_other(nodes, tiny_model, "second.yaml"), ingress={"port": 8001})
    jobs.submit("second", second, BREAKEVEN_CACHE=str(nodes.folder / "second"))
    assert "a cluster already runs on this Ray cluster, at http" in jobs.ended("second")
    assert _ask(cluster, PROMPTS[0]) == plain[0]
    assert jobs.command("stop", "first").returncode == 0
    _ready(jobs, "third", config)
    assert {row["pid"] for row in cluster.replicas().values()}.isdisjoint(
        row["pid"] for row in rows.values()
    )
    assert [_ask(cluster, prompt) for prompt in PROMPTS] == plain
    assert jobs.command("stop", "third").returncode == 0


def _ready(jobs: Jobs, name: str, config: Path) -> None:
    jobs.submit(name, config)
    deadline = time.monotonic() + READY_S
    while "ready http" not in (said := jobs.logs(name)):
        assert not jobs.failed(name), said
        assert time.monotonic() < deadline, said
        time.sleep(1.0)
