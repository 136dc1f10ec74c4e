"""A hundred greedy streams that lose their decode replica in mid-stream."""

from typing import Any

from tests.fault.faults import Kind, struck
from tests.flow.cluster_process import Cluster
from tests.flow.stream import Stream
from tests.waiting import await_that

ROUNDS: tuple[Kind, ...] = ("stop", "kill", "stop", "stop", "kill", "stop", "stop")
AT_ONCE = 16
GENERATED = 300
DISTURBED = 100
# Of each answer, what has been seen when its replica is struck.
SEEN_TOKENS = 10

Asked = tuple[str, dict[str, Any]]
_PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.1}
_SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 40}},
    "required": ["names"],
}


def _completion(number: int, **more: Any) -> Asked:
    prompt = list(range(100 * number + 1, 100 * number + 70 + 5 * number))
    return "/v1/completions", {**_OPTIONS, "prompt": prompt, **more}


def _chat(number: int, **more: Any) -> Asked:
    words = f"Count the lamps of street {number}, from the harbour to the mill. " * number
    messages = [{"role": "user", "content": words}]
    return "/v1/chat/completions", {**_OPTIONS, "messages": messages, **more}


_OPTIONS = {"model": "smollm2", "temperature": 0, "max_tokens": GENERATED, "ignore_eos": True}


def _mix() -> list[Asked]:
    """Sixteen different requests: chat and completions, plain ones and such with state."""
    asked = [_completion(number) for number in range(1, 6)]
    asked += [_chat(number) for number in range(1, 5)]
    asked += [_completion(6, seed=7), _chat(6, seed=8)]
    asked += [_completion(7, **_PENALTIES), _chat(7, **_PENALTIES)]
    json = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}
    asked += [_chat(8, response_format=json, ignore_eos=False)]
    return asked


def _start(cluster: Cluster, asked: list[Asked], label: str) -> list[Stream]:
    return [
        Stream(cluster.url, path, body, f"{label}-{number}")
        for number, (path, body) in enumerate(asked)
    ]


def _with_stops(asked: list[Asked], whole: list[Stream]) -> list[Asked]:
    """Two more requests, each with a stop string that occurs late in its answer only."""
    more = []
    for (path, body), stream in list(zip(asked, whole, strict=True))[:2]:
        text = stream.text
        starts = (i for i in range(len(text) * 3 // 4, len(text) - 8))
        at = next(i for i in starts if text.find(text[i : i + 8]) == i)
        more.append((path, {**body, "stop": [text[at : at + 8]]}))
    return [*asked, *more]


def _down(cluster: Cluster, pid: int) -> bool:
    return {row["pid"]: row["state"] for row in cluster.pool("decode")}[pid] == "down"


def test_a_hundred_disturbed_streams_are_identical(pools: Cluster) -> None:
    """Whatever was asked, a greedy stream whose replica is killed or stopped goes on on the other
    one, token by token as without the fault; nothing is lost, doubled or told twice."""
    asked = _mix()
    whole = [stream.done() for stream in _start(pools, asked, "whole")]
    asked = _with_stops(asked, whole)
    assert len(asked) == AT_ONCE
    undisturbed = [stream.done().answer for stream in _start(pools, asked, "undisturbed")]
    assert undisturbed[: len(whole)] == [stream.answer for stream in whole]
    assert [finish for _, _, finish in undisturbed[-2:]] == ["stop", "stop"]
    spare, busy = (row["pid"] for row in pools.pool("decode"))
    for number, kind in enumerate(ROUNDS):
        with struck("stop", spare):
            await_that(lambda pid=spare: _down(pools, pid), "the spare one is down")
            streams = _start(pools, asked, f"round{number}")
            await_that(
                lambda all_of=streams: all(len(s.tokens) > SEEN_TOKENS for s in all_of),
                "streams have begun",
                30,
            )
        await_that(lambda pid=spare: not _down(pools, pid), "the spare one is up")
        with struck(kind, busy) as dead:
            assert [stream.done().answer for stream in streams] == undisturbed
        pools.await_back("decode", 2, dead, pairs=2)
        (busy,) = {row["pid"] for row in pools.pool("decode")} - {spare} - dead
        spare, busy = busy, spare
    records = pools.get("/admin/decisions")["decisions"]
    disturbed = [r for r in records if r["request_id"].startswith("round") and r["plans"] > 1]
    assert len(disturbed) >= DISTURBED
    assert all("reason=decode_lost" in record["plan"] for record in disturbed)
