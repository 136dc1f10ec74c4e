"""Dashboards and alerts against a real Prometheus that scrapes a real cluster."""

import contextlib
import json
import re
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import dashboards
from tests.deploy.chart import ALERTS
from tests.deploy.conftest import Tool
from tests.fault.faults import struck
from tests.flow.cluster_process import Cluster, running
from tests.waiting import await_that

pytestmark = pytest.mark.deploy
# What a rate is taken over; Grafana's variable is at least four scrapes.
SCRAPE_S, RATE = 1, "20s"
CONFIG = """
tiers:
  host: {bytes: 16777216}
  disk: {path: DISK, bytes: 67108864}
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
    (tmp / "small.yaml").write_text(CONFIG.replace("DISK", str(tmp / "disk")))
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
    """It finds every process by what an ingress tells. Alerts do not wait, and look back for
    seconds: how long they do either is `promtool`'s to test."""
    tmp = tmp_path_factory.mktemp("prometheus")
    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"
        rule["expr"] = re.sub(r"\[\w+:\w+\]", "[4s:1s]", rule["expr"])
        rule["expr"] = re.sub(r"\[\w+\]", f"[{RATE}]", rule["expr"])
    (tmp / "alerts.yaml").write_text(yaml.safe_dump(rules))
    targets = {"url": f"{cluster.url}/metrics/targets", "refresh_interval": "5s"}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(tmp / "alerts.yaml")],
        "scrape_configs": [{"job_name": "breakeven", "http_sd_configs": [targets]}],
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
        return len(server.query("up == 1")) == 5
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


def _ask(
    cluster: Cluster, number: int, length: int, tier: str = "auto", max_tokens: int = 8
) -> None:
    answer = _post(cluster, number, length, tier, max_tokens)
    assert answer.status_code == 200, answer.text


def _post(
    cluster: Cluster, number: int, length: int, tier: str = "auto", max_tokens: int = 8
) -> httpx.Response:
    prompt = [1000 + number * 1000 + n for n in range(length)]
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "service_tier": tier}
    body |= {"temperature": 0, "ignore_eos": True}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)


@contextlib.contextmanager
def _policy(cluster: Cluster, policy: str) -> Iterator[None]:
    """Requests are planned by it meanwhile."""
    _order(cluster, policy)
    try:
        yield
    finally:
        _order(cluster, "breakeven")


def _order(cluster: Cluster, policy: str) -> None:
    httpx.post(f"{cluster.url}/admin/policy", json={"policy": policy}).raise_for_status()


@pytest.mark.usefixtures("busy")
def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    """Each query of each dashboard finds series, none of them NaN alone."""
    empty = []
    for board, panel, query in dashboards.queries():
        asked = query.replace("$__rate_interval", RATE).replace(dashboards.VARIABLE, ".*")
        found = prometheus.query(asked)
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
    """Also when its record has gone and nobody tells of it any more; it is over once the replica
    goes on."""
    [row] = cluster.pool("prefill")
    with struck("stop", row["pid"]):
        await_that(lambda: prometheus.firing("BreakevenReplicaDown"), "it fires", 30.0, 0.5)
        # Longer than its record lives; the shipped rule wants it to last for minutes.
        for _ in range(20):
            time.sleep(1.0)
            assert prometheus.firing("BreakevenReplicaDown")
        told = prometheus.query('breakeven_replica_up{role="prefill"}')
        assert not [series for series in told if series["value"][1] == "1"]
    cluster.await_back("prefill", 1, (), pairs=1)
    await_that(lambda: not prometheus.firing("BreakevenReplicaDown"), "it is over", 20.0, 0.5)


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


@pytest.mark.usefixtures("busy")
def test_blocks_that_cannot_be_read_raise_their_alert(
    cluster: Cluster, prometheus: Prometheus
) -> None:
    """A disk that ruins what it holds: each prompt is computed again, and answered."""
    assert not prometheus.firing("BreakevenHandoffsFailing")
    # More than paged KV and host memory hold.
    for number in range(24):
        _ask(cluster, number, 1500)
    for file in (cluster.cache.parent / "disk").rglob("*.kv"):
        file.write_bytes(file.read_bytes()[:-1])
    with _policy(cluster, "always_fetch"):
        for number in range(8):
            _ask(cluster, number, 1500)
    await_that(lambda: prometheus.firing("BreakevenHandoffsFailing"), "it fires", 20.0, 0.5)


@pytest.mark.usefixtures("busy")
def test_a_pool_without_seats_raises_its_alert(cluster: Cluster, prometheus: Prometheus) -> None:
    """Long answers, five times as many at once as there are seats; then it is over."""
    assert not prometheus.firing("BreakevenPoolSaturated")
    with ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(_ask, cluster, 0, 40, "auto", 1200) for _ in range(20)]
        await_that(lambda: prometheus.firing("BreakevenPoolSaturated"), "it fires", 30.0, 0.2)
        for each in asked:
            each.result()
    await_that(lambda: not prometheus.firing("BreakevenPoolSaturated"), "it is over", 20.0, 0.5)


@pytest.mark.usefixtures("busy")
def test_prefills_that_nobody_reads_raise_their_alert(
    cluster: Cluster, prometheus: Prometheus
) -> None:
    """The decode replica hangs while prefills go on; what they leave ends with its lease, which is
    what is told."""
    assert not prometheus.firing("BreakevenLeasesGrowing")
    [decode] = cluster.pool("decode")
    with (
        _policy(cluster, "least_loaded"),
        ThreadPoolExecutor(40) as clients,
        struck("stop", decode["pid"]),
    ):
        # Until it is known to hang; from then on nothing is prefilled for it.
        for number in range(40):
            clients.submit(_post, cluster, number, 60)
            time.sleep(0.07)
        # Each lease ends after `kv.lease_s`, long after the reader has left routing.
        await_that(partial(prometheus.firing, "BreakevenLeasesGrowing"), "it fires", 75.0, 0.2)
    cluster.await_back("decode", 1, (), pairs=1)


@pytest.mark.usefixtures("busy")
def test_first_tokens_that_come_late_raise_their_alert(
    cluster: Cluster, prometheus: Prometheus
) -> None:
    """Replicas that stand still for a moment whenever somebody asks, shorter than one that hangs
    is given up."""
    await_that(lambda: not prometheus.firing("BreakevenPredictionDrift"), "none", 40.0, 0.5)
    pids = [row["pid"] for row in cluster.replicas().values()]
    with ThreadPoolExecutor(1) as client:
        for number in range(12):
            with struck("stop", *pids):
                asked = client.submit(_ask, cluster, number, 40)
                time.sleep(1.0)
            asked.result()
    await_that(lambda: prometheus.firing("BreakevenPredictionDrift"), "it fires", 10.0, 0.2)
