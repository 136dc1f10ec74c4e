"""Dashboards and alerts against a real Prometheus that scrapes a real cluster."""

import json
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import dashboards
from tests.deploy.chart import CHART, ROOT
from tests.deploy.conftest import Tool
from tests.fault.faults import struck
from tests.flow.cluster_process import Cluster, running
from tests.waiting import await_that

pytestmark = pytest.mark.deploy
ALERTS = CHART / "monitoring" / "alerts.yaml"
# What a rate is taken over; Grafana's variable is at least four scrapes.
SCRAPE_S, RATE = 1, "20s"
CONFIG = """
tiers:
  host: {bytes: 16777216}
  vault: {shards: 1, memory_bytes: 33554432}
router: {assumed_streams: 8}
engine: {kv_cache_memory_bytes: 8388608, max_model_len: 2048, max_num_seqs: 4}
"""


@dataclass(frozen=True)
class Prometheus:
    """A server, by its address."""

    url: str

    def query(self, text: str) -> list[dict[str, Any]]:
        """Series that an instant query finds."""
        asked = urllib.parse.urlencode({"query": text})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        series: list[dict[str, Any]] = found["data"]["result"]
        return series

    def firing(self, alert: str) -> bool:
        return bool(self.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}'))


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """Small caches, so that blocks are evicted, and a small vault, so that it fills."""
    tmp = tmp_path_factory.mktemp("monitored")
    (tmp / "small.yaml").write_text(CONFIG)
    words = ("--model", str(tiny_model), "--config", str(tmp / "small.yaml"))
    with running(tmp, tiny_model.parent, free_port(), *words) as made:
        yield made


@pytest.fixture(scope="module")
def prometheus(
    tool: Tool,
    cluster: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
) -> Iterator[Prometheus]:
    """It finds the ingress by its address, and engines and shards by what that one tells. Alerts
    do not wait: how long they do is `promtool`'s to test."""
    tmp, address = tmp_path_factory.mktemp("prometheus"), cluster.url.removeprefix("http://")
    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"
    (tmp / "alerts.yaml").write_text(yaml.safe_dump(rules))
    targets = {"url": f"{cluster.url}/metrics/targets", "refresh_interval": "5s"}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(tmp / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": "ingress", "static_configs": [{"targets": [address]}]},
            {"job_name": "engines", "http_sd_configs": [targets]},
        ],
    }
    (tmp / "prometheus.yaml").write_text(yaml.safe_dump(config))
    made = Prometheus(f"http://127.0.0.1:{free_port()}")
    words = [tool("prometheus", "prometheus"), f"--config.file={tmp / 'prometheus.yaml'}"]
    words += [f"--storage.tsdb.path={tmp / 'data'}"]
    words += [f"--web.listen-address={made.url.removeprefix('http://')}"]
    with (tmp / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        await_that(lambda: _up(made), "it scrapes every process", 60.0, 0.5)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _up(server: Prometheus) -> bool:
    try:
        return len(server.query("up == 1")) == 4
    except OSError:
        return False


@pytest.fixture(scope="module")
def busy(cluster: Cluster, prometheus: Prometheus) -> None:
    """Requests of both classes, long and short, some of them again; for longer than a rate."""
    until, number = time.monotonic() + 30.0, 0
    while time.monotonic() < until:
        number += 1
        tier = "flex" if number % 3 == 0 else "auto"
        for length in (40, 900):
            _ask(cluster, number % 12, length, tier)


def _ask(cluster: Cluster, number: int, length: int, tier: str = "auto") -> None:
    prompt = [1000 + number * 1000 + n for n in range(length)]
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "service_tier": tier}
    body |= {"temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_rules_are_well_formed_and_each_fires_by_its_fault(tool: Tool) -> None:
    """Over hours of made-up series; none fires while all is well."""
    promtool = tool("prometheus", "promtool")
    for words in (["check", "rules", str(ALERTS)], ["test", "rules", "alerts_test.yaml"]):
        here = ROOT / "tests" / "deploy"
        done = subprocess.run([promtool, *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load((ROOT / "tests" / "deploy" / "alerts_test.yaml").read_text())
    said = json.dumps(tests)
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert said.count(rule["alert"]) >= 2


def test_every_alert_has_its_paragraph() -> None:
    """In the page that operators read."""
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert f"**{rule['alert']}**" in page


def test_dashboards_are_what_the_code_makes() -> None:
    """`make chart` writes them."""
    pytest.importorskip("grafana_foundation_sdk", reason="requirements/deploy.txt has it")
    for board in dashboards.BOARDS:
        path = dashboards.FOLDER / f"{board.uid}.json"
        assert path.read_text() == dashboards.rendered(board), "run `make chart`"


@pytest.mark.usefixtures("busy")
def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    """Each query of each dashboard finds series, none of them NaN alone."""
    empty = []
    for board, panel, query in dashboards.queries():
        found = prometheus.query(query.replace("$__rate_interval", RATE))
        values = [series["value"][1] for series in found]
        if not values or all(value == "NaN" for value in values):
            empty.append((board, panel, query))
    assert empty == []


@pytest.mark.usefixtures("busy")
def test_every_metric_of_an_alert_is_there(prometheus: Prometheus) -> None:
    """What its expression names is scraped, so that its silence means something."""
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        names = {word for word in _words(rule["expr"]) if word.startswith("breakeven_")}
        assert names
        for name in names:
            assert prometheus.query(name), name


def _words(expression: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in expression).split()


@pytest.mark.usefixtures("busy")
def test_a_replica_that_hangs_raises_its_alert(cluster: Cluster, prometheus: Prometheus) -> None:
    """And it is over once the replica goes on."""
    [row] = cluster.pool("prefill")
    with struck("stop", row["pid"]):
        await_that(lambda: prometheus.firing("BreakevenReplicaDown"), "it fires", 30.0, 0.5)
    cluster.await_back("prefill", 1, (), pairs=1)


@pytest.mark.usefixtures("busy")
def test_a_catalogue_that_hangs_raises_its_alert(cluster: Cluster, prometheus: Prometheus) -> None:
    """Plans go on without hits meanwhile."""
    with struck("stop", cluster.get("/admin/replicas")["catalogue"]["pid"]):
        await_that(lambda: prometheus.firing("BreakevenCatalogueGap"), "it fires", 30.0, 0.5)
        _ask(cluster, 30, 40)


@pytest.mark.usefixtures("busy")
def test_a_full_vault_raises_its_alert(cluster: Cluster, prometheus: Prometheus) -> None:
    """Different prompts, until it has no room left."""
    assert not prometheus.firing("BreakevenHandoffsFailing")
    number = 100
    deadline = time.monotonic() + 120.0
    while not prometheus.firing("BreakevenVaultNearQuota"):
        assert time.monotonic() < deadline, cluster.get("/admin/replicas")["vault"]
        number += 1
        _ask(cluster, number % 35, 1500)
