"""Replicas that are replaced under load."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fault.stage import Stage
from tests.flow.cluster_process import Cluster, running
from tests.waiting import await_that

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def pools(
    stage: Stage,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    free_port: Callable[[], int],
) -> Iterator[Cluster]:
    """One prefill and one decode replica of the tiny model."""
    stage.clear()
    memory = ("--engine-arg", "kv_cache_memory_bytes=134217728")
    tmp = tmp_path_factory.mktemp("rolling")
    words = ("--model", str(tiny_model), *memory)
    with running(tmp, tiny_model.parent, free_port(), *words) as cluster:
        yield cluster


class _Client(threading.Thread):
    """Asks for one long greedy completion after another until told to stop."""

    def __init__(self, url: str, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.answers: list[list[int]] = []
        self.failures: list[str] = []
        self.enough = threading.Event()
        self._url, self._prompt = f"{url}/v1/completions", prompt

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                answer = httpx.post(self._url, json=self._body(), timeout=120)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                return
            if answer.status_code != 200:
                self.failures.append(f"{answer.status_code} {answer.text}")
                return
            self.answers.append(answer.json()["choices"][0]["token_ids"])

    def _body(self) -> dict[str, Any]:
        options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": "smollm2", "prompt": self._prompt, "max_tokens": 400, **options}


def test_a_rolling_restart_of_both_pools_drops_no_stream(pools: Cluster) -> None:
    """`breakeven restart` under load: each replica is another process afterwards, every answer
    on the way is whole and always the same, and the books balance."""
    before = {name: row["pid"] for name, row in pools.replicas().items()}
    prompts = [list(range(50 * i + 1, 50 * i + 70)) for i in range(3)]
    clients = [_Client(pools.url, prompt) for prompt in prompts]
    for client in clients:
        client.start()
    await_that(lambda: all(each.answers or each.failures for each in clients), "all ask", 150)
    done = pools.command("restart")
    for client in clients:
        client.enough.set()
    for client in clients:
        client.join(150)
        assert not client.is_alive()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    after = {row["pid"] for row in pools.replicas().values() if row["state"] == "up"}
    assert not after & set(before.values())
    for client in clients:
        assert client.failures == []
        assert len(client.answers) >= 2
        assert all(answer == client.answers[0] for answer in client.answers)
    pools.await_rest()


def test_a_pool_that_does_not_exist_is_refused(pools: Cluster) -> None:
    """With the names that do, and nothing restarts."""
    done = pools.command("restart", "decoder")
    assert done.returncode == 1
    assert "prefill or decode" in done.stderr
