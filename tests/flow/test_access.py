"""A cluster with keys: tenants cannot see each other's cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.access import digest
from tests.flow.cluster_process import ROOT, Cluster, start

pytestmark = pytest.mark.real_model
TEXT = "The quick brown fox jumps over the lazy dog. " * 12
CHAT = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    tmp = tmp_path_factory.mktemp("guarded")
    keys, config = tmp / "keys.yaml", tmp / "config.yaml"
    lines = [f"  - {{sha256: {digest(key)}, tenant: {key}}}" for key in ("acme", "umbrella")]
    keys.write_text("keys:\n" + "\n".join(lines) + f"\nadmin: [{digest('root')}]\n")
    config.write_text(f"ingress: {{keys_file: {keys}}}\n")
    # One engine: with two, computing so small a prompt anew can be the cheaper plan.
    words = ("--config", str(config), "--model", str(tiny_model), "--prefill", "0")
    memory = ("--engine-arg", "kv_cache_memory_bytes=67108864")
    cluster = start(tmp / "run", tiny_model.parent, free_port(), *words, *memory)
    yield cluster
    cluster.command("down")
    cluster.process.wait(30)


def _cached(cluster: Cluster, key: str, path: str, body: dict[str, Any]) -> int:
    """Prompt tokens that were not computed for a request under this key."""
    answer = httpx.post(
        cluster.url + path,
        json={"model": "smollm2", "max_tokens": 1, **body},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return int(usage.get("cache_read_input_tokens") or details.get("cached_tokens") or 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/completions", {"prompt": TEXT, "cache_salt": "shared"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/messages", {"messages": [*CHAT, {"role": "assistant", "content": "Yes."}, *CHAT]}),
    ],
    ids=["completions", "salted", "chat", "messages"],
)
def test_no_tenant_hits_anothers_cache(guarded: Cluster, path: str, body: dict[str, Any]) -> None:
    """A tenant's second request hits its own blocks; the same prompt of another tenant hits
    none of them, by any API, whatever salt both send."""
    other_before = _cached(guarded, "umbrella", path, body)
    first, again = (_cached(guarded, "acme", path, body) for _ in range(2))
    other_again = _cached(guarded, "umbrella", path, body)
    assert again >= 64
    assert other_again >= 64
    # What the first request of each could hit is its own tenant's earlier tests at most.
    assert first == other_before


def test_without_a_key_only_health_and_metrics_answer(guarded: Cluster) -> None:
    """Routes of the API and of the administration want their keys, and `status` says which."""
    for path in ("/v1/models", "/admin/replicas", "/admin/decisions", "/version"):
        assert httpx.get(guarded.url + path).status_code == 401
        assert httpx.get(guarded.url + path, headers={"x-api-key": "no"}).status_code == 401
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200
    assert httpx.get(f"{guarded.url}/metrics").status_code == 200
    status = [sys.executable, "-m", "cluster", "status", "--json"]
    env = {**os.environ, "BREAKEVEN_CACHE": str(guarded.cache)}
    refused = subprocess.run(status, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "BREAKEVEN_ADMIN_KEY" in refused.stderr
    env["BREAKEVEN_ADMIN_KEY"] = "root"
    shown = subprocess.run(status, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(json.loads(shown.stdout)["replicas"]) == 1
