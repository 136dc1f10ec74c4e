"""The audit of a running cluster, as its operator reads it."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv.audit import Entry, read
from router.rotation import lines_of, newest_first
from tests.flow.cluster_process import Cluster, running

pytestmark = pytest.mark.real_model
WORDS = "Never write this sentence to a file, whatever happens to it."


@pytest.fixture(scope="module")
def audited(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """One prefill and one decode replica of a small model."""
    tmp = tmp_path_factory.mktemp("audited")
    words = ("--model", str(tiny_model), "--engine-arg", "kv_cache_memory_bytes=67108864")
    with running(tmp / "run", tiny_model.parent, free_port(), *words) as cluster:
        yield cluster


def ask(cluster: Cluster, request_id: str, prompt: str | list[int], tokens: int = 4) -> str:
    """The plan of one request."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    body["prompt_cache_key"] = "my-conversation"
    headers = {"x-request-id": request_id}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-breakeven-plan"])


def audit_of(cluster: Cluster) -> tuple[list[Entry], bytes]:
    """What is in the files, as entries and as it stands there."""
    paths = newest_first(cluster.cache / "audit")
    lines = [line for path in reversed(paths) for line in lines_of(path)]
    return list(read(lines, lambda bad: pytest.fail(str(bad)))), b"".join(lines)


def test_a_request_is_explained_while_the_cluster_runs(audited: Cluster) -> None:
    """By its id, for people and for programs; an unknown one is an error in a line."""
    plan = ask(audited, "explained", WORDS * 20)
    told = audited.command("explain", "explained")
    assert told.returncode == 0, told.stderr
    assert "explained: interactive request" in told.stdout
    assert f"plan: {plan.partition(';')[0]} on" in told.stdout
    assert "compute" in told.stdout
    report = json.loads(audited.command("explain", "explained", "--json").stdout)
    (entry,) = report["entries"]
    assert entry["plans"][0]["plan"]["reason"] == plan.partition("reason=")[2]
    unknown = audited.command("explain", "nobody")
    assert unknown.returncode == 1
    assert "no request 'nobody' is known" in unknown.stderr


def test_what_is_written_is_private_and_tells_nothing_of_the_text(audited: Cluster) -> None:
    """One line for each request, in a file of 0600; no words, no tokens, no client's names; two
    prompts that begin alike have the same first blocks."""
    shared = [100 + number for number in range(96)]
    ask(audited, "first", WORDS)
    ask(audited, "second", [*shared, *range(1000, 1064)])
    ask(audited, "third", [*shared, *range(2000, 2064)])
    audited.await_rest()
    entries, written = audit_of(audited)
    by_id = {entry.request_id: entry for entry in entries}
    assert len(by_id) == len(entries)
    assert {"first", "second", "third"} <= by_id.keys()
    for told in (b"Never write", b"my-conversation", b"default"):
        assert told not in written
    folder = audited.cache / "audit"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    second, third = (by_id[name].asked for name in ("second", "third"))
    alike = [a == b for a, b in zip(second.names(), third.names(), strict=True)]
    assert alike == [True] * 3 + [False]
    assert (second.block_tokens, second.max_tokens) == (32, 4)


def test_parts_of_a_request_lie_within_its_time_to_the_first_token(audited: Cluster) -> None:
    """On a real engine's clock and the ingress's, predicted parts end with the prediction."""
    ask(audited, "timed", list(range(3000, 3400)), tokens=8)
    audited.await_rest()
    (entry,) = [each for each in audit_of(audited)[0] if each.request_id == "timed"]
    assert entry.plan.parts[-1].end_s == pytest.approx(entry.plan.predicted_ttft_s)
    assert entry.ttft_s is not None
    assert max(part.end_s for part in entry.parts) == pytest.approx(
        entry.ttft_s - entry.plans[-1].after_s, abs=0.01
    )
    assert entry.answer_tokens == 8
    assert entry.itl_max_s is not None
    assert entry.error_ratio is not None
    shape = entry.plan.shape
    assert audited.metrics()[f'breakeven_plan_error_ratio_count{{plan="{shape}"}}'] >= 1


def test_times_are_finer_than_milliseconds(audited: Cluster) -> None:
    """A decision takes some 0.2 ms, and so does a message: a clock of whole milliseconds, as the
    event loop has, would tell neither."""
    for number in range(5):
        ask(audited, f"fine-{number}", [11] * 40)
    audited.await_rest()
    entries = [each for each in audit_of(audited)[0] if each.request_id.startswith("fine-")]
    decisions_ms = [1000 * entry.plans[0].after_s for entry in entries]
    assert len(decisions_ms) == 5
    assert any(abs(ms - round(ms)) > 0.01 for ms in decisions_ms), decisions_ms


@pytest.mark.parametrize(
    ("query", "says"), [("limit=0", "limit"), ("request_id=a%0Ab", "request_id"), ("x=1", "'x'")]
)
def test_what_is_no_filter_is_refused(audited: Cluster, query: str, says: str) -> None:
    """With a 400 that says what is wrong."""
    answer = httpx.get(f"{audited.url}/admin/decisions?{query}")
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_filters_pick_decisions(audited: Cluster) -> None:
    """Those of an id, and the last few."""
    ask(audited, "picked", [7] * 40)
    picked: dict[str, Any] = audited.get("/admin/decisions?request_id=picked")
    assert [row["request_id"] for row in picked["decisions"]] == ["picked"]
    assert len(audited.get("/admin/decisions?limit=1")["decisions"]) == 1


def test_a_request_is_explained_when_the_cluster_is_gone(
    tmp_path: Path, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    """From the state folder: whatever ended was written before the cluster ended."""
    words = ("--model", str(tiny_model), "--engine-arg", "kv_cache_memory_bytes=67108864")
    with running(tmp_path, tiny_model.parent, free_port(), "--prefill", "0", *words) as cluster:
        ask(cluster, "kept", [5] * 50)
    told = cluster.command("explain", "kept")
    assert told.returncode == 0, told.stderr
    assert "kept: interactive request" in told.stdout
    assert (cluster.cache / "audit" / "ingress-0.jsonl").exists()
