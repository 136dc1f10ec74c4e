"""What the chart hands to KubeRay, on two real Ray nodes: they are started by its parameters, in
network namespaces with its port range, and Serve deploys its configuration."""

import json
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.links.cluster import RayNodes, bare_nodes
from benchmarks.links.network import LinkRefusedError, Shape, check
from benchmarks.links.node import Node
from benchmarks.result import ROOT
from router.access import digest
from tests.deploy.chart import Document, Helm, of_kind, pods, serve_config
from tests.deploy.conftest import Tool
from tests.flow.plain_engine import greedy
from tests.waiting import await_that

pytestmark = [pytest.mark.real_model, pytest.mark.engine, pytest.mark.deploy]
PROMPT = [300 + 11 * n % 30_000 for n in range(600)]
ANSWER_TOKENS, READY_S = 12, 240.0
KEY, ADMIN = "bk-of-a-test", "bk-of-an-admin"
SECTIONS: dict[str, Any] = {
    "engine": {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 26},
    "kv": {"transports": "tcp"},
    "ingress": {"drain_s": 5},
    "router": {"policy": "least_loaded"},
}
_SERVE = str(Path(sys.executable).with_name("serve"))


@dataclass(frozen=True)
class Service:
    """A RayService's Ray cluster, and what was rendered."""

    nodes: RayNodes
    documents: list[Document]
    model: Path

    def deploy(self, sections: Mapping[str, Any]) -> None:
        """Hand the chart's configuration to Serve, as KubeRay does, with these other sections."""
        config = serve_config(self.documents)
        told = config["applications"][0]["args"]
        told |= {"model": str(self.model), **sections}
        told["ingress"]["keys_file"] = str(self.nodes.folder / "keys.yaml")
        file = self.nodes.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        words = [_SERVE, "deploy", "--address", self._dashboard(), str(file)]
        done = self.nodes.near.run(words, self.nodes.env, timeout_s=120.0)
        assert done.returncode == 0, done.stdout + done.stderr

    def state(self) -> dict[str, Any]:
        """The application's, as Serve tells KubeRay."""
        words = [_SERVE, "status", "--address", self._dashboard()]
        said = self.nodes.near.run(words, self.nodes.env, timeout_s=60.0).stdout
        state: dict[str, Any] = yaml.safe_load(said)["applications"]["breakeven"]
        return state

    def get(self, path: str, key: str = ADMIN) -> Any:
        asked = urllib.request.Request(self._http(path), headers=_bearer(key))
        with self.nodes.near.network(), urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        """As the chart's probe asks."""
        return _answers(self.nodes.near, self._http("/readyz"))

    def tokens(self) -> list[int]:
        """Of an answer to the prompt, for somebody with a key."""
        body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": ANSWER_TOKENS}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        told = {"content-type": "application/json", **_bearer(KEY)}
        asked = urllib.request.Request(
            self._http("/v1/completions"), json.dumps(body).encode(), told
        )
        with self.nodes.near.network(), urllib.request.urlopen(asked, timeout=60) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens

    def replicas(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.get("/admin/replicas")["replicas"]}

    def _http(self, path: str) -> str:
        return f"http://{self.nodes.near.address}:8000{path}"

    def _dashboard(self) -> str:
        return f"http://{self.nodes.near.address}:8265"


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _answers(at: Node, url: str) -> bool:
    try:
        with at.network(), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _ray_start(documents: list[Document], group: str, offers: dict[str, int]) -> list[str]:
    """The words of a group's parameters, with what the node offers in their place."""
    [service] = of_kind(documents, "RayService")
    ray = service["spec"]["rayClusterConfig"]
    groups = {each["groupName"]: each["rayStartParams"] for each in ray["workerGroupSpecs"]}
    params = groups.get(group, ray["headGroupSpec"]["rayStartParams"])
    params = {**params, "num-cpus": "64", "resources": json.dumps(offers)}
    return [f"--{name}={value}" for name, value in params.items()]


@pytest.fixture(scope="module")
def service(
    tool: Tool, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The head's node has an ingress's and both engines' places, the other one an engine's."""
    try:
        check()
    except LinkRefusedError as refusal:
        pytest.skip(str(refusal))
    home = str(tmp_path_factory.mktemp("helm"))
    documents = Helm(tool("helm3", "helm"), {"HOME": home}).documents(more={"config": SECTIONS})
    [sysctl] = pods(documents)["decode"]["spec"]["securityContext"]["sysctls"]
    with bare_nodes(Shape()) as nodes:
        (nodes.folder / "keys.yaml").write_text(
            f"keys: [{{sha256: {digest(KEY)}, tenant: acme}}]\nadmin: [{digest(ADMIN)}]\n"
        )
        env = {
            "BREAKEVEN_CLUSTER_KEY": secrets.token_hex(32),
            "BREAKEVEN_CACHE": str(nodes.folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        for at in (nodes.near, nodes.far):
            setting = [sysctl["name"], sysctl["value"]]
            done = at.run(["sysctl", "-w", "=".join(setting)])
            assert done.returncode == 0, done.stderr
        near = {"breakeven_ingress": 1, "breakeven_catalogue": 1, "breakeven_decode": 1}
        head = ["--head", "--port=6379", "--include-dashboard=true"]
        nodes.start_ray(nodes.near, [*head, *_ray_start(documents, "head", near)], env)
        joins = [f"--address={nodes.near.address}:6379"]
        far = {"breakeven_prefill": 1}
        nodes.start_ray(nodes.far, [*joins, *_ray_start(documents, "prefill", far)], env)
        made = Service(nodes, documents, tiny_model)
        made.deploy({})
        await_that(made.ready, "it is ready", READY_S, 1.0)
        yield made


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> list[int]:
    """What one plain vLLM engine answers."""
    return greedy(tiny_model, [{"ids": PROMPT, "n": ANSWER_TOKENS}])[0]


def test_the_chart_s_configuration_serves(service: Service, plain: list[int]) -> None:
    """Each group's pods run what they are for; tokens are a plain engine's, over the link; keys
    are asked for."""
    rows = service.replicas()
    nodes = service.nodes
    assert rows["decode-0"]["node"] == nodes.near.address
    assert rows["prefill-0"]["node"] == nodes.far.address
    assert service.tokens() == plain
    time.sleep(1.5)  # a replica tells at least once a second
    assert service.replicas()["decode-0"]["lanes"] == ["tcp/wire"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        service.get("/admin/replicas", "bk-of-nobody")


def test_probes_of_the_chart_are_answered(service: Service) -> None:
    """Ray's agent without its token, and each engine's own metrics at the port of the chart, with
    vLLM's beside ours."""
    for at in (service.nodes.near, service.nodes.far):
        assert _answers(at, f"http://{at.address}:52365/api/local_raylet_healthz")
        with at.network(), urllib.request.urlopen(f"http://{at.address}:9464/metrics") as answer:
            said = answer.read().decode()
        assert "breakeven_engine_running 0.0" in said
        assert "vllm:num_requests_running" in said
    rows = service.get("/metrics/targets")
    targets = {row["labels"].get("replica", "other"): row["targets"] for row in rows}
    assert targets["prefill-0"] == [f"{service.nodes.far.address}:9464"]
    assert [f"{service.nodes.near.address}:9465"] in [row["targets"] for row in rows]


def test_nothing_listens_outside_of_the_network_policy(service: Service) -> None:
    """Ports of Ray, UCX, NIXL, vLLM and our own that others could reach are those it opens."""
    [policy] = of_kind(service.documents, "NetworkPolicy")
    opened: set[int] = set()
    for rule in policy["spec"]["ingress"]:
        for port in rule["ports"]:
            opened |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
    for at in (service.nodes.near, service.nodes.far):
        found = _listening(at)
        assert found
        assert found - opened == set(), _who(at)


def _listening(at: Node) -> set[int]:
    """Ports of sockets that are not on loopback alone."""
    places = [
        line.split()[3].rsplit(":", 1) for line in at.run(["ss", "-ltnH"]).stdout.splitlines()
    ]
    return {int(port) for host, port in places if not host.startswith(("127.", "[::1]"))}


def _who(at: Node) -> str:
    return at.run(["ss", "-ltnpH"]).stdout


def test_another_configuration_replaces_replicas_and_a_wrong_one_none(
    service: Service, plain: list[int]
) -> None:
    """Serve tells the reason of a refusal, and what runs goes on."""
    before = {name: row["pid"] for name, row in service.replicas().items()}
    service.deploy({"router": {"policy": "fastest"}})
    await_that(lambda: service.state()["status"] == "DEPLOY_FAILED", "it is refused", 60.0, 1.0)
    assert "fastest" in service.state()["message"]
    assert service.tokens() == plain
    assert {name: row["pid"] for name, row in service.replicas().items()} == before
    service.deploy({"router": {"policy": "round_robin"}})

    def replaced() -> bool:
        try:
            now = {name: row["pid"] for name, row in service.replicas().items()}
            policy = service.get("/admin/policy")["policy"]
        except OSError:
            return False
        ours = policy == "round_robin" and service.ready()
        return ours and not set(now.values()) & set(before.values()) and now.keys() == before.keys()

    await_that(replaced, "the replicas are others", READY_S, 1.0)
    assert service.tokens() == plain


def test_a_second_cluster_is_refused_and_the_first_stays(
    service: Service, plain: list[int]
) -> None:
    """`serve` on a Ray cluster whose Serve was handed a configuration: it would replace, and then
    end, what others rely on."""
    before = {name: row["pid"] for name, row in service.replicas().items()}
    nodes = service.nodes
    config = nodes.configured({}, service.model)
    sections = {**yaml.safe_load(config.read_text()), "ingress": {"port": 8007}}
    config.write_text(yaml.safe_dump(sections))
    words = [sys.executable, "-m", "cluster", "serve", "--config", str(config)]
    env = {**nodes.env, "PYTHONPATH": str(ROOT), "BREAKEVEN_CACHE": str(nodes.folder / "second")}
    done = nodes.near.run(words, env, timeout_s=120.0)
    assert done.returncode != 0
    assert "by a configuration that it was handed" in done.stdout + done.stderr
    assert {name: row["pid"] for name, row in service.replicas().items()} == before
    assert service.tokens() == plain


def test_a_node_that_drains_is_left(service: Service, plain: list[int]) -> None:
    """`breakeven drain` returns once nothing of ours runs there. There is no other place for a
    prefill replica here, so decode replicas compute prompts themselves."""
    words = [sys.executable, "-m", "cluster", "drain", "--seconds", "60"]
    done: subprocess.CompletedProcess[str] = service.nodes.far.run(
        words, {**service.nodes.env, "PYTHONPATH": str(ROOT)}, timeout_s=90.0
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 left after ")
    await_that(lambda: "prefill-0" not in service.replicas(), "it is gone", 30.0, 0.5)
    assert service.tokens() == plain
