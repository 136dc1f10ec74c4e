"""The kill switch and the shadow on a running cluster."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.flow.cluster_process import Cluster, running

pytestmark = pytest.mark.real_model
# A cluster follows an order within a second, and GCS takes some milliseconds.
FOLLOWS_S = 3.0


@pytest.fixture(scope="module")
def steered(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """Two ingress replicas on one port, over one prefill and one decode replica."""
    tmp = tmp_path_factory.mktemp("steered")
    config = tmp / "config.yaml"
    config.write_text("ingress: {replicas: 2, cpus: 0.5}\nrouter: {shadow: least_loaded}\n")
    words = ("--config", str(config), "--model", str(tiny_model))
    memory = ("--engine-arg", "kv_cache_memory_bytes=67108864")
    with running(tmp / "run", tiny_model.parent, free_port(), *words, *memory) as cluster:
        yield cluster


def _plan(cluster: Cluster, prompt: list[int]) -> str:
    """The plan of one request, over a connection of its own: either ingress may take it."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 2}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-breakeven-plan"]


def _reasons(cluster: Cluster, tokens: int = 40) -> set[str]:
    """Why 12 requests were planned as they were; one ingress takes them all once in 2,000."""
    plans = [_plan(cluster, [number + 5] * tokens) for number in range(12)]
    return {plan.partition("reason=")[2] for plan in plans}


def _policy(cluster: Cluster, *words: str) -> dict[str, Any]:
    done = cluster.command("policy", *words, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_kill_switch_reaches_every_ingress_and_is_taken_back(steered: Cluster) -> None:
    """`breakeven policy least_loaded` puts every plan of every ingress under least_loaded within
    its time; `status` tells; and `breakeven policy breakeven` puts all back."""
    assert _policy(steered)["policy"] == "breakeven"
    assert "least_loaded" not in _reasons(steered)
    assert _policy(steered, "least_loaded")["policy"] == "least_loaded"
    time.sleep(FOLLOWS_S)
    assert _reasons(steered) == {"least_loaded"}
    # A handoff of less than a block is a handoff too.
    assert _reasons(steered, tokens=1) == {"least_loaded"}
    assert "configured: breakeven" in steered.command("status").stdout
    assert _policy(steered, "breakeven")["policy"] == "breakeven"
    time.sleep(FOLLOWS_S)
    assert "least_loaded" not in _reasons(steered)
    assert "configured" not in steered.command("status").stdout
    steered.await_rest()


def test_without_gcs_an_order_is_refused_and_the_last_one_stays(steered: Cluster) -> None:
    """While GCS does not answer, the operator hears so and requests go on under the last order;
    once it answers, the next order is taken."""
    gcs = _gcs(steered)
    gcs.suspend()
    try:
        refused = steered.command("policy", "round_robin")
        assert refused.returncode == 1
        assert "the last one stays in force: no answer within 3 s" in refused.stderr
        assert "round_robin" not in _reasons(steered)
    finally:
        gcs.resume()
    assert _policy(steered, "round_robin")["policy"] == "round_robin"
    time.sleep(FOLLOWS_S)
    assert _reasons(steered) == {"round_robin"}
    _policy(steered, "breakeven")


def _gcs(cluster: Cluster) -> psutil.Process:
    run_dir = str(cluster.run_dir())
    for process in psutil.process_iter():
        if process.name() == "gcs_server" and any(run_dir in word for word in process.cmdline()):
            return process
    raise AssertionError(f"no GCS of {run_dir}")


def test_a_shadow_plans_beside_every_request(steered: Cluster) -> None:
    """Each decision shows its shadow's plan, /admin/shadow and the metrics count them, and an
    order without a shadow ends it."""
    _policy(steered, "breakeven", "--shadow", "least_loaded")
    time.sleep(FOLLOWS_S)
    _reasons(steered)
    shadows = [decision["shadow"] for decision in steered.get("/admin/decisions")["decisions"]]
    assert shadows[-1]["policy"] == "least_loaded"
    assert shadows[-1]["plan"].endswith("reason=least_loaded")
    tallies = steered.get("/admin/shadow")["shadows"]
    pairs = {(tally["policy"], tally["shadow"]): tally for tally in tallies}
    assert pairs["breakeven", "least_loaded"]["compared"] > 0
    assert steered.metrics()['breakeven_policy{policy="breakeven"}'] == 1
    assert _policy(steered, "--shadow", "none")["shadow"] is None
    time.sleep(FOLLOWS_S)
    _reasons(steered)
    assert steered.get("/admin/decisions")["decisions"][-1]["shadow"] is None


@pytest.mark.parametrize(
    ("headers", "body", "status", "says"),
    [
        ({}, '{"policy": "fastest"}', 400, "least_loaded"),
        ({}, '{"polcy": "least_loaded"}', 400, "polcy"),
        ({}, "{}", 400, "nothing to change"),
        ({}, "[", 400, "least_loaded"),
        ({}, '{"policy": null}', 400, "least_loaded"),
        ({"content-type": "text/plain"}, "{}", 415, "application/json"),
        ({"origin": "http://example.com"}, "{}", 403, "browser"),
        ({"host": "rebound.example.com"}, "{}", 403, "rebound.example.com"),
    ],
)
def test_an_order_that_is_none_is_refused(
    steered: Cluster, headers: dict[str, str], body: str, status: int, says: str
) -> None:
    """Bad input and what a browser may be made to send is refused in words."""
    sent = {"content-type": "application/json", **headers}
    answer = httpx.post(f"{steered.url}/admin/policy", content=body, headers=sent)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
