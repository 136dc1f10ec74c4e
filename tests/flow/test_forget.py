"""`breakeven forget` on a cluster with two tenants: one loses its cache, the other keeps it."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.access import digest
from tests.flow.cluster_process import Cluster, running
from tests.waiting import await_that

pytestmark = pytest.mark.real_model
TENANTS = ("acme", "umbrella")


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    tmp = tmp_path_factory.mktemp("forgetting")
    keys, config = tmp / "keys.yaml", tmp / "config.yaml"
    lines = [f"  - {{sha256: {digest(key)}, tenant: {key}}}" for key in TENANTS]
    keys.write_text("keys:\n" + "\n".join(lines) + f"\nadmin: [{digest('root')}]\n")
    config.write_text(f"ingress: {{keys_file: {keys}}}\n")
    words = ("--config", str(config), "--model", str(tiny_model), "--prefill", "1", "--decode", "1")
    memory = ("--engine-arg", "kv_cache_memory_bytes=134217728")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BREAKEVEN_ADMIN_KEY", "root")
        with running(tmp / "run", tiny_model.parent, free_port(), *words, *memory) as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def balanced(cluster: Cluster) -> Iterator[None]:
    """The books balance after each test."""
    yield
    cluster.await_rest()
    assert cluster.total("failed_transfers") == 0


def _ask(cluster: Cluster, key: str, first: int, n_tokens: int = 8) -> tuple[int, list[int]]:
    """Prompt tokens that were not computed, and the answer."""
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json=_body(first, n_tokens),
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0), answer.json()["choices"][0]["token_ids"]


def _body(first: int, n_tokens: int) -> dict[str, Any]:
    options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    prompt = list(range(first, first + 970))  # 30 blocks and a tail
    return {"model": "smollm2", "prompt": prompt, "max_tokens": n_tokens, **options}


def _warm(cluster: Cluster, key: str, first: int) -> list[int]:
    """Ask until the cache answers; the tokens, which never change."""
    _, tokens = _ask(cluster, key, first)
    for _ in range(10):
        cached, again = _ask(cluster, key, first)
        assert again == tokens
        if cached >= 900:
            return tokens
        time.sleep(0.3)
    raise AssertionError("never cached")


def _forget(cluster: Cluster, tenant: str) -> dict[str, dict[str, Any]]:
    done = cluster.command("forget", "--tenant", tenant, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tenant"] == tenant
    assert report["complete"] is True
    return {row["name"]: row for row in report["replicas"]}


def test_one_tenant_is_forgotten_and_the_other_is_not(cluster: Cluster) -> None:
    """Its repeat computes every token, to the same answer; the other's repeat still hits."""
    tokens = {tenant: _warm(cluster, tenant, 1000) for tenant in TENANTS}
    assert tokens["acme"] == tokens["umbrella"]
    before = cluster.cached_blocks()
    rows = _forget(cluster, "acme")
    assert set(rows) == {"prefill-0", "decode-0"}
    erased = sum(row["blocks"] for row in rows.values())
    assert erased >= 30
    assert cluster.cached_blocks() == before - erased
    assert _ask(cluster, "acme", 1000) == (0, tokens["acme"])
    cached, again = _ask(cluster, "umbrella", 1000)
    assert cached >= 900
    assert again == tokens["umbrella"]


def test_a_running_stream_goes_on(cluster: Cluster) -> None:
    """To the tokens that it would have had; afterwards nothing of it is found."""
    _, whole = _ask(cluster, "acme", 3000, 400)
    _forget(cluster, "acme")
    tokens: list[int] = []
    forgotten = threading.Thread(target=_forget, args=(cluster, "acme"))
    body = {**_body(3000, 400), "stream": True}
    headers = {"authorization": "Bearer acme"}
    url = f"{cluster.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
            if len(tokens) > 20 and forgotten.ident is None:
                forgotten.start()
    assert forgotten.ident is not None, "the stream ended at once"
    forgotten.join(60)
    assert not forgotten.is_alive()
    assert tokens == whole
    assert _ask(cluster, "acme", 3000, 400) == (0, whole)


def test_a_tenant_that_nobody_knows_has_nothing(cluster: Cluster) -> None:
    """Its key may have left the file before its data is to go."""
    assert all(row["blocks"] == 0 for row in _forget(cluster, "initech").values())


def test_a_line_for_each_replica(cluster: Cluster) -> None:
    """What people read."""
    done = cluster.command("forget", "--tenant", "initech")
    lines = sorted(done.stdout.splitlines())
    assert lines == ["decode-0: 0 blocks erased", "prefill-0: 0 blocks erased"]


def test_only_an_admin_s_program_may_forget(cluster: Cluster) -> None:
    """Not a tenant, nobody without a key, and no page in an admin's browser."""

    def forget(key: str, **headers: str) -> int:
        given = {"authorization": f"Bearer {key}", **headers}
        order = {"tenant": "umbrella"}
        return httpx.post(f"{cluster.url}/admin/forget", json=order, headers=given).status_code

    _warm(cluster, "umbrella", 5000)
    assert forget("umbrella") == forget("nobody") == 401
    assert forget("root", origin="http://evil.example") == 403
    assert _ask(cluster, "umbrella", 5000)[0] >= 900
    assert httpx.get(f"{cluster.url}/admin/forget").status_code == 405


def test_a_replica_that_does_not_answer_is_told(cluster: Cluster) -> None:
    """The command says so and fails, so that a script repeats it."""
    pid = int(cluster.replicas()["prefill-0"]["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        await_that(lambda: cluster.replicas()["prefill-0"]["state"] != "up", "it is missed", 20)
        done = cluster.command("forget", "--tenant", "acme")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1
    assert "prefill-0: not erased: is down" in done.stdout
    assert "blocks erased" in done.stdout
