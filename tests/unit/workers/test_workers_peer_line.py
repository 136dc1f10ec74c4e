"""What a reader makes of a peer that answers, fails, and rests."""

import logging
import threading
import time
from typing import Any

import pytest

from tests.waiting import await_that
from workers.errors import PeerLostError
from workers.peer import line as lines
from workers.peer.line import Line


class Session:
    """A connection that is counted."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


class Job:
    """Records what became of it; `error` is raised when it runs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.deadline_s = time.monotonic() + 5.0
        self.outcome, self.ended, self._error = "", threading.Event(), error

    def over(self) -> bool:
        return False

    def run(self, session: Any) -> None:
        if self._error is not None:
            raise self._error
        self._end("ran")

    def fail(self) -> None:
        self._end("failed")

    def _end(self, outcome: str) -> None:
        assert not self.outcome
        self.outcome = outcome
        self.ended.set()


LOST = PeerLostError("tcp://p", "no answer in time")


class Peer:
    """A line with its sessions."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.line = Line("tcp://p", self.connect)

    def connect(self, deadline_s: float) -> Any:
        self.sessions.append(Session())
        return self.sessions[-1]

    def ask(self, job: Job) -> str:
        self.line.submit(job)
        assert job.ended.wait(5)
        return job.outcome


def test_jobs_share_a_connection() -> None:
    """It is made for the first of them, and closed with the line."""
    peer = Peer()
    assert [peer.ask(Job()) for _ in range(3)] == ["ran"] * 3
    assert len(peer.sessions) == 1
    peer.line.close()
    await_that(lambda: peer.sessions[0].closed == 1, "closed")


def test_a_failure_costs_the_connection_and_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    """What is asked meanwhile fails at once and unconnected; one line says so."""
    peer = Peer()
    with caplog.at_level(logging.WARNING):
        assert peer.ask(Job(LOST)) == "failed"
        assert peer.line.resting
        assert [peer.ask(Job()) for _ in range(3)] == ["failed"] * 3
    await_that(lambda: peer.sessions[0].closed == 1, "closed")
    assert len(peer.sessions) == 1
    [record] = caplog.records
    assert "no answer in time" in record.message


def test_pauses_double_until_the_peer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure after a pause begins a longer one; an answer starts over."""
    monkeypatch.setattr(lines, "REST_S", 0.01)
    peer = Peer()
    pauses = []
    for _ in range(3):
        assert peer.ask(Job(LOST)) == "failed"
        pauses.append(peer.line._rest_s)
        await_that(lambda: not peer.line.resting, "rested")
    assert pauses == [0.02, 0.04, 0.08]
    assert peer.ask(Job()) == "ran"
    await_that(lambda: peer.line._rest_s == 0.01, "starts over")


def test_a_surprise_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is raised is the peer's failure."""
    peer = Peer()
    assert peer.ask(Job(ValueError("odd"))) == "failed"
    assert "odd" in caplog.text
    peer.line._again_s = 0.0
    assert peer.ask(Job()) == "ran"


def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next job makes another."""
    monkeypatch.setattr(lines, "IDLE_S", 0.02)
    peer = Peer()
    assert peer.ask(Job()) == "ran"
    await_that(lambda: peer.sessions[0].closed == 1, "closed")
    assert peer.ask(Job()) == "ran"
    assert len(peer.sessions) == 2
