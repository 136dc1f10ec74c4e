"""`breakeven batch` against a server of its own that answers, refuses, is busy and dies."""

import asyncio
import contextlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import batch as batch_module
from cluster.batch import STOPPED, Asked, batch
from cluster.batch_file import answers
from cluster.errors import BatchFileError, NotRunningError, RefusedError

URL = "/v1/completions"


def call(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": URL, "body": {"prompt": name, **body}}


class Server:
    """Answers each prompt by `say`, which gets it and how often it was asked before: a status, or
    None to close the connection."""

    def __init__(self, say: Callable[[str, int], int | None], needs_key: bool = False) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most = self._now = 0
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                allowed = not needs_key or self.headers.get("authorization") == "Bearer k"
                self._answer(200 if allowed else 401, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    before = outer.asked[body["prompt"]]
                    outer.asked[body["prompt"]] += 1
                    outer.bodies.append(body)
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                status = say(body["prompt"], before)
                with lock:
                    outer._now -= 1
                if status is None:
                    self.close_connection = True
                    return
                self._answer(status, {"said": body["prompt"]})

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.send_header("retry-after", "0")
                self.send_header("x-request-id", "r")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batch_module, "_AGAIN_S", 0.01)
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BREAKEVEN_API_KEY", raising=False)


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Ten requests, with an empty line among them."""
    lines = [json.dumps(call(f"c{number}")) for number in range(10)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return Asked(tmp_path / "in.jsonl", tmp_path / "out.jsonl", 4)


def run(asked: Asked, server: Server) -> int:
    return batch(Asked(asked.requests, asked.answers, asked.concurrency, server.url))


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by name; each once."""
    said = [json.loads(line) for line in path.read_text().splitlines()]
    named = {answer["custom_id"]: answer for answer in said}
    assert len(named) == len(said)
    return named


def test_each_request_has_its_answer(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """In OpenAI's form, at most so many at once, as `flex` whatever the body says."""
    with Server(lambda prompt, before: 200) as server:
        assert run(asked, server) == 0
    said = lines_of(asked.answers)
    assert set(said) == {f"c{number}" for number in range(10)}
    for name, answer in said.items():
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == {"said": name}
        assert answer["error"] is None
        assert answer["id"] == "batch_req_r"
    assert server.most <= 4
    assert {body["service_tier"] for body in server.bodies} == {"flex"}
    assert "10 of 10 answered, 0 refused, 0 left" in capsys.readouterr().out


def test_refusals_are_answers(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """A request that is wrong is not sent again, now or in a later run."""
    with Server(lambda prompt, before: 400 if prompt == "c3" else 200) as server:
        assert run(asked, server) == 1
        assert run(asked, server) == 1
    assert lines_of(asked.answers)["c3"]["response"]["status_code"] == 400
    assert set(server.asked.values()) == {1}
    assert "9 of 10 answered, 1 refused, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize("status", [429, 503, None])
def test_who_is_busy_or_gone_is_asked_again(asked: Asked, status: int | None) -> None:
    """Limits, a queue that is full, and connections that break."""
    with Server(lambda prompt, before: status if before < 5 else 200) as server:
        assert run(asked, server) == 0
    assert set(server.asked.values()) == {6}


def test_what_fails_has_no_answer_and_is_sent_by_the_next_run(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tries, while the others go on."""
    with Server(lambda prompt, before: 500 if prompt == "c3" and before < 4 else 200) as server:
        assert run(asked, server) == 1
        assert "c3" not in lines_of(asked.answers)
        assert "9 of 10 answered, 0 refused, 1 left; the same" in capsys.readouterr().out
        assert run(asked, server) == 0
    assert server.asked["c3"] == 5
    assert len(lines_of(asked.answers)) == 10


def test_a_line_that_a_crash_cut_off_is_answered_again(asked: Asked) -> None:
    """What is whole stays, to the byte."""
    with Server(lambda prompt, before: 200) as server:
        assert run(asked, server) == 0
        whole = asked.answers.read_bytes()
        lines = whole.splitlines(keepends=True)
        asked.answers.write_bytes(b"".join(lines[:6]) + lines[6][:20])
        assert run(asked, server) == 0
    assert asked.answers.read_bytes().startswith(b"".join(lines[:6]))
    assert len(lines_of(asked.answers)) == 10
    assert sum(server.asked.values()) == 14


def test_an_interrupt_keeps_what_was_answered(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the midst of it: 130, and the next run does the rest."""
    sent = threading.Event()

    def say(prompt: str, before: int) -> int:
        if prompt == "c6" and not before:
            sent.set()
            threading.Event().wait(1.0)
        return 200

    run_all = batch_module._Sending.all

    async def interrupted(self: Any, left: Iterator[Any]) -> None:
        task = asyncio.create_task(run_all(self, left))
        await asyncio.to_thread(sent.wait)
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        raise KeyboardInterrupt

    with Server(say) as server:
        with monkeypatch.context() as patched:
            patched.setattr(batch_module._Sending, "all", interrupted)
            assert run(asked, server) == STOPPED
        assert 6 <= len(lines_of(asked.answers)) < 10
        assert "the same command goes on" in capsys.readouterr().out
        assert run(asked, server) == 0
    assert len(lines_of(asked.answers)) == 10


def test_nobody_there_is_said_at_once(asked: Asked) -> None:
    """And where the cluster dies for good, after some patience."""
    with Server(lambda prompt, before: 200) as server:
        pass
    with pytest.raises(NotRunningError, match=server.url):
        run(asked, server)


def test_a_cluster_that_stays_away_ends_the_run(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered by then is kept."""
    monkeypatch.setattr(batch_module, "PATIENCE_S", 0.2)
    with (
        Server(lambda prompt, before: 200 if prompt < "c5" else None) as server,
        pytest.raises(NotRunningError),
    ):
        run(asked, server)
    assert set(lines_of(asked.answers)) == {f"c{number}" for number in range(5)}


def test_a_key_is_shown_where_one_is_wanted(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing is sent."""
    with Server(lambda prompt, before: 200, needs_key=True) as server:
        with pytest.raises(RefusedError, match="BREAKEVEN_API_KEY"):
            run(asked, server)
        assert not server.asked
        monkeypatch.setenv("BREAKEVEN_API_KEY", "k")
        assert run(asked, server) == 0


GOOD = json.dumps(call("good"))


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("{", 1, "truncated"),
        (f"{GOOD}\n[]", 2, "array"),
        (f"{GOOD}\n\n{GOOD}", 3, "given twice"),
        (json.dumps({**call("a"), "more": 1}), 1, "more"),
        (json.dumps({"custom_id": "a", "url": URL}), 1, "body"),
        (json.dumps({**call("a"), "url": "/v1/embeddings"}), 1, "/v1/chat/completions"),
        (json.dumps({**call("a"), "method": "GET"}), 1, "POST"),
        (json.dumps(call("")), 1, "custom_id has 0"),
        (json.dumps(call("a" * 513)), 1, "custom_id has 513"),
        (json.dumps(call("a", stream=True)), 1, "stream"),
        ("\xff", 1, "JSON"),
        ("[" * 100_000, 1, ""),
    ],
)
def test_a_bad_request_is_refused_with_its_line_before_anything_is_sent(
    tmp_path: Path, text: str, line: int, complaint: str
) -> None:
    """The file is checked whole."""
    requests = tmp_path / "in.jsonl"
    requests.write_bytes(text.encode("latin-1"))
    with Server(lambda prompt, before: 200) as server:
        with pytest.raises(BatchFileError, match=f"line {line}: .*{complaint}"):
            run(Asked(requests, tmp_path / "out.jsonl", 1), server)
        assert not server.asked


def test_a_file_that_is_not_its_own_is_left_alone(asked: Asked, tmp_path: Path) -> None:
    """The requests themselves, another batch's answers, anybody's notes, a folder, no file."""
    with Server(lambda prompt, before: 200) as server:
        assert run(asked, server) == 0
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps(call("another")) + "\n")
        notes = tmp_path / "notes"
        notes.write_text("buy milk\n")
        for requests, place, complaint in (
            (other, other, "holds the requests"),
            (other, asked.answers, "does not ask"),
            (other, notes, "line 1: no answer of a batch"),
            (other, tmp_path, "directory"),
            (tmp_path / "none", tmp_path / "out", "No such file"),
        ):
            before = place.read_bytes() if place.is_file() else b""
            with pytest.raises(BatchFileError, match=complaint):
                run(Asked(requests, place, 1), server)
            assert not before or place.read_bytes() == before
        assert "another" not in server.asked


def test_two_runs_do_not_write_to_one_file(asked: Asked) -> None:
    """The second one says so."""
    with (
        answers(asked.answers),
        Server(lambda prompt, before: 200) as server,
        pytest.raises(BatchFileError, match="another process"),
    ):
        run(asked, server)
