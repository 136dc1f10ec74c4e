"""A batch on real engines: killed in its midst, gone on with, tokens unchanged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flow.cluster_process import ROOT, Cluster
from tests.waiting import await_that

pytestmark = pytest.mark.real_model
REQUESTS = 40


def _body(number: int) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "prompt": [1000 + 10 * number + n for n in range(40)],
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_batch_that_was_killed_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Every request is answered once, by the tokens that somebody who waits gets, and none of those
    that were answered before is sent again. All of them ran as batch work."""
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    calls = [
        {"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": _body(n)}
        for n in range(REQUESTS)
    ]
    requests.write_text("".join(json.dumps(call) + "\n" for call in calls))
    words = [sys.executable, "-m", "cluster", "batch", str(requests), str(answers)]
    env = {**os.environ, "BREAKEVEN_CACHE": str(cluster.cache)}
    first = subprocess.Popen([*words, "--concurrency", "4"], cwd=ROOT, env=env)
    await_that(lambda: len(_lines(answers)) >= 5, "some are answered", 60.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = _lines(answers)
    assert len(before) < REQUESTS
    again = cluster.command("batch", str(requests), str(answers), "--json")
    assert again.returncode == 0, again.stderr
    told = {"total": REQUESTS, "answered": REQUESTS, "refused": 0, "left": 0}
    assert json.loads(again.stdout) == told
    said = [json.loads(line) for line in _lines(answers)]
    assert sorted(each["custom_id"] for each in said) == sorted(f"c{n}" for n in range(REQUESTS))
    assert _lines(answers)[: len(before) - 1] == before[:-1]
    tokens = {
        each["custom_id"]: each["response"]["body"]["choices"][0]["token_ids"] for each in said
    }
    for number in (0, REQUESTS - 1):
        waited = httpx.post(f"{cluster.url}/v1/completions", json=_body(number), timeout=60).json()
        assert tokens[f"c{number}"] == waited["choices"][0]["token_ids"]
    rows = cluster.get("/admin/decisions")["decisions"]
    classes = [row["class"] for row in rows if row["prompt_tokens"] == 40]
    assert classes.count("batch") >= REQUESTS
    cluster.await_rest()
