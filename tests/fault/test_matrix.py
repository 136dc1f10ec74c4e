"""kill -9 and SIGSTOP of each process at each step of a request's path.

In mid-stream the decode replica is struck in test_streams.py; a prefill replica while its blocks
are being read in test_peers_complaints.py; an ingress in test_two_ingresses.py.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.fault.faults import (
    KINDS,
    Kind,
    ask_long,
    ask_short,
    decision,
    decodes,
    half_way,
    pair,
    struck,
)
from tests.flow.cluster_process import Cluster
from tests.flow.stream import Stream
from tests.waiting import await_that

kinds = pytest.mark.parametrize("kind", KINDS)
Truth = dict[str, list[int]]
Ask = Callable[[Cluster, str], Stream]
# Silence that is noticed, another plan, and its compute on a machine that is also starting the
# dead replica anew.
ANSWERED_S = 40.0


def _moved_on(pools: Cluster, stream: Stream, reason: str, struck_name: str) -> None:
    """The request was planned again, for this reason, on other replicas."""
    record = decision(pools, stream)
    assert record["plans"] >= 2
    assert f"reason={reason}" in record["plan"]
    assert f"@{struck_name};" not in record["plan"]


def _gets_no_work(pools: Cluster, name: str, truth: Truth) -> None:
    """A replica that hangs is down, and requests do not wait for it."""
    assert pools.replicas()[name]["state"] == "down"
    streams = [ask_long(pools, f"past-{name}").done(), ask_short(pools, f"past-{name}").done()]
    assert [stream.tokens for stream in streams] == [truth["long"], truth["short"]]
    assert [decision(pools, stream)["plans"] for stream in streams] == [1, 1]
    assert all(f"@{name};" not in stream.plan for stream in streams)


@kinds
def test_prefill_replica_before_its_work(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """A request that is sent to a prefill replica which has just died or hung is computed by the
    other; the dead one comes back, the other gets no work until it answers again."""

    def prefill(salt: str) -> str:
        return pair(pools, decision(pools, ask_long(pools, salt).done()))[0]

    with _asked_when_gone(pools, kind, prefill, ask_long, "prefill") as (stream, name):
        assert stream.tokens == truth["long"]
        _moved_on(pools, stream, "prefill_lost", name)
        if kind == "stop":
            _gets_no_work(pools, name, truth)


@contextlib.contextmanager
def _asked_when_gone(
    pools: Cluster, kind: Kind, serves: Callable[[str], str], ask: Ask, role: str
) -> Iterator[tuple[Stream, str]]:
    """A request that met a struck replica, and that one's name. Which of two equal replicas is next
    is for the router to say: one that serves twice in a row is struck, sometimes in vain."""
    for attempt in range(4):
        salts = (f"{role}-before-{kind}-{attempt}-{n}" for n in itertools.count())
        names = [serves(next(salts)), serves(next(salts))]
        while names[-1] != names[-2] and len(names) < 8:
            names.append(serves(next(salts)))
        pools.await_rest()
        with struck(kind, pools.replicas()[names[-1]]["pid"]) as dead:
            stream = ask(pools, next(salts)).done(ANSWERED_S)
            if met := decision(pools, stream)["plans"] > 1:
                yield stream, names[-1]
        pools.await_back(role, 2, dead, pairs=2)
        if met:
            return
    raise AssertionError(f"no request was planned on a {role} replica that was gone")


@kinds
def test_prefill_replica_during_its_work(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """A prefill that its replica does not end is computed by the other."""
    stream = ask_long(pools, f"P-during-{kind}")

    def computing() -> dict[str, Any] | None:
        return next((r for r in pools.pool("prefill") if r["pending_prefill_tokens"]), None)

    row = await_that(computing, "a prefill replica computes")
    with struck(kind, row["pid"]) as dead:
        assert stream.done(ANSWERED_S).tokens == truth["long"]
        _moved_on(pools, stream, "prefill_lost", row["name"])
    pools.await_back("prefill", 2, dead, pairs=2)


@kinds
def test_prefill_replica_after_its_work(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """Blocks that lie ready on a prefill replica which dies or hangs before they are read are
    computed anew; no wrong token comes of it."""
    before = pools.total("failed_transfers")
    stream, row, waiting = _unread(pools, kind)
    with struck(kind, row["pid"]) as dead:
        waiting.close()  # the decode replicas go on, and find no source
        assert stream.done(ANSWERED_S).tokens == truth["long"]
        planned_again = decision(pools, stream)["plans"] > 1
        assert planned_again or pools.total("failed_transfers") > before
    pools.await_back("prefill", 2, dead, pairs=2)


def _unread(pools: Cluster, kind: Kind) -> tuple[Stream, dict[str, Any], ExitStack]:
    """A stream, the replica on which its blocks lie ready, and what to close so that they are
    read: the decode replicas are stopped, for less than the 3 s after which they were lost."""
    for attempt in range(16):
        stream = ask_long(pools, f"P-after-{kind}-{attempt}")
        while stream.is_alive() and not any(0 < left <= 1800 for left in _left(pools)):
            time.sleep(0.005)
        waiting = ExitStack()
        waiting.enter_context(struck("stop", *(r["pid"] for r in pools.pool("decode"))))
        deadline = time.monotonic() + 1.8
        while time.monotonic() < deadline:
            ready = [row for row in pools.pool("prefill") if row["leased"]]
            if ready:
                return stream, ready[0], waiting
            time.sleep(0.02)
        waiting.close()
        stream.done(ANSWERED_S)
        pools.await_rest()
    raise AssertionError("no handoff was caught unread")


def _left(pools: Cluster) -> list[int]:
    """Prompt tokens that each prefill replica has still to compute."""
    return [row["pending_prefill_tokens"] for row in pools.pool("prefill")]


@kinds
def test_decode_replica_before_its_work(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """A request that is sent to a decode replica which has just died or hung is answered by the
    other."""

    def serves(salt: str) -> str:
        return decodes(pools, ask_short(pools, salt).done())

    with _asked_when_gone(pools, kind, serves, ask_short, "decode") as (stream, name):
        assert stream.tokens == truth["short"]
        _moved_on(pools, stream, "decode_lost", name)
        if kind == "stop":
            _gets_no_work(pools, name, truth)


@kinds
def test_decode_replica_while_it_receives(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """A decode replica that dies or hangs with half of a prompt's blocks: the other one answers,
    and the blocks that nobody reads any more are free when their lease ends (the fixture waits)."""
    with half_way(pools, f"D-receives-{kind}") as reading:
        pid = reading.decode["pid"]
        with struck(kind, pid) as dead:
            os.kill(reading.prefill["pid"], signal.SIGCONT)  # it is the reader that is gone
            assert reading.stream.done(ANSWERED_S).tokens == truth["long"]
            assert "reason=decode_lost" in decision(pools, reading.stream)["plan"]
    pools.await_back("decode", 2, dead, pairs=2)


@kinds
def test_catalogue(pools: Cluster, truth: Truth, kind: Kind) -> None:
    """Without the catalogue requests that run go on, those that come are planned as if nothing
    were cached and say so; once it is back, hits are found again."""
    cached = f"catalogue-{kind}"
    assert ask_long(pools, cached).done().tokens == truth["long"]
    during = [ask_short(pools, f"{cached}-{number}") for number in range(4)]
    await_that(lambda: all(stream.tokens for stream in during), "streams have begun")
    pid = pools.get("/admin/replicas")["catalogue"]["pid"]
    with struck(kind, pid) as dead:
        blind = ask_long(pools, cached).done(ANSWERED_S)
        assert blind.tokens == truth["long"]
        assert "hit=0" in blind.plan
        assert "reason=no_catalogue" in blind.plan
        assert [stream.done().tokens for stream in during] == [truth["short"]] * 4

        def is_back() -> bool:
            catalogue = pools.get("/admin/replicas")["catalogue"]
            return catalogue["state"] == "up" and catalogue["pid"] not in dead

        if kind == "kill":
            await_that(is_back, "the catalogue is back", 60)
    await_that(is_back, "the catalogue is back", 60)
    pools.await_rest()
    again = await_that(lambda: _hits(pools, cached, truth), "hits are found again")
    assert "reason=no_catalogue" not in again.plan


def _hits(pools: Cluster, salt: str, truth: Truth) -> Stream | None:
    stream = ask_long(pools, salt).done()
    assert stream.tokens == truth["long"]
    return None if "hit=0" in stream.plan else stream
