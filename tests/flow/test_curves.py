"""Curves of a running cluster follow what its requests took."""

import json
import random
import time
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from router.curve_book import LEAST_SAMPLES, SECONDS_BETWEEN
from tests.flow.cluster_process import Cluster, running

# Requests learn a moment after their first token.
LEARNS_S = 0.5


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """One prefill and one decode replica."""
    tmp = tmp_path_factory.mktemp("curves")
    words = ("--model", str(tiny_model), "--engine-arg", "kv_cache_memory_bytes=134217728")
    with running(tmp, tiny_model.parent, free_port(), *words) as cluster:
        yield cluster


def _ask(cluster: Cluster, rng: random.Random, tokens: int) -> dict[str, Any]:
    """The decision on one prompt that nobody has seen, once it was answered."""
    prompt = [rng.randrange(5, 30_000) for _ in range(tokens)]
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 2}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    decision: dict[str, Any] = cluster.get("/admin/decisions")["decisions"][-1]
    return decision


def test_requests_move_the_curves(measured: Cluster) -> None:
    """Each request is a sample of whoever computed it, and of the link if it was handed off; what
    is then predicted is about what comes."""
    before, rng = measured.get("/admin/curves"), random.Random(1)
    decisions = [_ask(measured, rng, rng.randrange(64, 1000)) for _ in range(30)]
    time.sleep(LEARNS_S)
    after = measured.get("/admin/curves?points=1")
    computed = dict.fromkeys(after["prefill"], 0)
    for decision in decisions:
        computed[decision["prefill"] or decision["decode"]] += 1
    told = {name: row["samples"] for name, row in after["prefill"].items()}
    assert told == computed
    assert before["prefill"] != after["prefill"]
    remote = sum(decision["prefill"] is not None for decision in decisions)
    (link,) = after["links"].values()
    assert link["samples"] == len(link["points"]) == remote
    off = [abs(log(d["ttft_s"] / d["predicted_ttft_s"])) for d in decisions[10:]]
    # Of prompts of 10 to 60 ms, on a machine that may do other things beside.
    assert median(off) < log(2.0), off
    measured.await_rest()


def test_calibrate_measures_tells_and_draws(measured: Cluster, tmp_path: Path) -> None:
    """Within seconds, on a cluster that serves; nothing is held afterwards."""
    before = measured.get("/admin/curves")
    picture = tmp_path / "curves.png"
    done = measured.command("calibrate", "--seconds", "10", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "prefill-0->decode-0" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(measured.command("calibrate", "--seconds", "3", "--json").stdout)
    assert report["probed"]["computed"] >= 2
    assert report["probed"]["handed_off"] >= 2
    for name, row in report["prefill"].items():
        assert row["samples"] > before["prefill"][name]["samples"]
    measured.await_rest()


def test_what_requests_told_is_kept(measured: Cluster) -> None:
    """For the next start, by model and hardware."""
    rng = random.Random(2)
    for _ in range(LEAST_SAMPLES):
        _ask(measured, rng, 300)
    deadline = time.monotonic() + SECONDS_BETWEEN + 10.0
    while not (files := list((measured.cache / "curves").glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(1.0)
    kept = json.loads(files[0].read_text())
    (curve,) = kept["prefill"].values()
    assert curve["samples"] >= LEAST_SAMPLES
    assert curve["per_token_s"] > 0.0
