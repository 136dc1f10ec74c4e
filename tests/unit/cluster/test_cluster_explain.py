"""`breakeven explain`: where it looks for a request, and what it prints of it."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Route

from cluster import state
from cluster.cli import main
from cluster.timeline import ASCII, Marks, differences, lines
from kv.audit import Asked, Entry, Planned, encode, read
from kv.parts import Action, Part
from kv.plan import Reason, Shape
from router.decisions import Decisions
from router.entry import Scribe
from router.pseudonyms import Pseudonyms
from tests.unit.kv.test_kv_audit import FIRST, entries
from tests.unit.router.audited import Clock, audit_of, remote, request

(RECORDED,) = read([FIRST.read_bytes()], lambda bad: pytest.fail(str(bad)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder in which a cluster of a port that nobody listens on was."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("BREAKEVEN_CACHE", str(cache))
    monkeypatch.delenv("BREAKEVEN_ADMIN_KEY", raising=False)
    state.write(tmp_path / "run", "http://127.0.0.1:9")
    return cache


def keep(cache: Path, name: str, *kept: Entry) -> Path:
    """A file of an audit."""
    path = cache / "audit" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(encode, kept)))
    return path


def named(request_id: str, **changes: object) -> Entry:
    return msgspec.structs.replace(RECORDED, request_id=request_id, **changes)


def test_a_recorded_request_is_a_timeline(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plan with the reason, predicted and actual seconds of each part, rivals, tokens."""
    keep(own_cache, "ingress-0.jsonl", named("other"), RECORDED)
    assert main(["explain", "req-1"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "req-1: interactive request of tenant 1c6d2f9a8b7e4d03",
        "prompt of 1,000 tokens, answer of 16 tokens (stop, all of it in 1.250 s)",
        "first token after 0.938 s, predicted 0.750 s: 1.25 times as long",
        "plan: fetch-remote on prefill-0 for decode-0",
        "cheaper_fetch: taking a prefix from tiers",
        "fetch        448 tokens  prefill-0, from host",
        "queue          prefill-0    0.125 s    0.250 s",
        "first step     decode-0  in handoff    0.062 s",
        "1.500 s    2.250 s  rival   local on decode-0 (+157 %)",
        "tokens at prefill-0: 488 computed, 64 device, 448 host",
        "moved to prefill-0: 20.6 MB host",
        "engines were computing the prompt for 0.562 s",
        "furthest off: queue at prefill-0, +0.125 s",
    ):
        assert words in shown
    assert "other" not in shown


def test_a_wait_for_a_turn_has_a_line() -> None:
    """Only where there was one."""
    waited = "  waited 12.500 s at the ingress for its turn, before all that follows"
    assert waited in lines(named("r", waited_s=12.5))
    assert not any("its turn" in line for line in lines(RECORDED))


def test_json_gives_the_entries(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the id, whole, the oldest first."""
    keep(own_cache, "ingress-0.jsonl", named("r", at_s=2.0))
    keep(own_cache, "ingress-0.1.jsonl", named("r", at_s=1.0), named("other"))
    keep(own_cache, "ingress-1.jsonl", named("r", at_s=3.0))
    assert main(["explain", "r", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["request_id"] == "r"
    lines = [json.dumps(entry).encode() for entry in report["entries"]]
    assert [entry.at_s for entry in read(lines, pytest.fail)] == [1.0, 2.0, 3.0]


def test_the_last_of_many_are_shown(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A client that gives every request one id gets the newest three, and the number of others."""
    keep(own_cache, "a.jsonl", *(named("r", at_s=float(number)) for number in range(10)))
    assert main(["explain", "r"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("r: interactive request") == 3
    assert "00:00:09.000 UTC" in shown
    assert "7 earlier requests had this id" in shown


def test_a_configured_folder_is_found_while_the_cluster_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state file says where it writes."""
    path = keep(tmp_path / "configured", "a.jsonl", RECORDED)
    state.write(tmp_path / "run", "http://127.0.0.1:9", audit=str(path.parent))
    assert main(["explain", "req-1"]) == 0
    assert "req-1: interactive" in capsys.readouterr().out


def test_an_unknown_id_is_an_error_that_says_where_it_looked(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit status 1."""
    keep(own_cache, "a.jsonl", RECORDED)
    assert main(["explain", "req-11"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "no request 'req-11' is known" in told.err
    assert "no cluster answers at http://127.0.0.1:9" in told.err
    assert str(own_cache / "audit") in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--file", "FILE"], ["--file", "FOLDER"]])
def test_a_file_or_a_folder_may_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Another machine's audit, wherever it was copied to."""
    path = keep(tmp_path / "elsewhere", "copied.jsonl", RECORDED)
    named_place = {"FILE": str(path), "FOLDER": str(path.parent)}
    assert main(["explain", "req-1", *(named_place.get(word, word) for word in words)]) == 0
    assert "req-1: interactive" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is not there, and one without the request."""
    assert main(["explain", "req-1", "--file", str(tmp_path / "none")]) == 1
    assert "none: No such file or directory;" in capsys.readouterr().err
    path = keep(tmp_path, "a.jsonl", named("other"))
    assert main(["explain", "req-1", "--file", str(path)]) == 1
    assert f"{path} has none of it" in capsys.readouterr().err


def test_a_bad_line_is_told_with_its_place_and_left_out(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The request that stands behind it is found all the same."""
    path = keep(own_cache, "a.jsonl", named("other"))
    with path.open("ab") as file:
        file.write(encode(RECORDED)[:200] + b"\n" + encode(RECORDED))
    assert main(["explain", "req-1"]) == 0
    told = capsys.readouterr()
    assert "req-1: interactive" in told.out
    assert f"{path}, line 2: " in told.err


@pytest.mark.parametrize(
    "request_id", ["a\nb", "a\x1b[2J", "", " ", "a b", "../../etc/passwd\n", "a" * 129, "\ud800"]
)
def test_an_id_that_no_request_can_have_is_refused(
    request_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anybody is asked, and without writing it to the terminal as it is."""
    with pytest.raises(SystemExit) as ended:
        main(["explain", request_id])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "1 to 128 visible characters" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("request_id", ["../../../etc/passwd", '"}', "a\\u0062", "%00", "*", "--"])
def test_an_id_is_never_taken_for_a_path_a_pattern_or_json(
    own_cache: Path, request_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An odd one is found as it is, and finds nothing else."""
    keep(own_cache, "a.jsonl", named("ab"), named(request_id))
    assert main(["explain", "--json", "--", request_id]) == 0
    (found,) = json.loads(capsys.readouterr().out)["entries"]
    assert found["request_id"] == request_id


def test_what_a_file_holds_moves_no_cursor(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may come from anywhere; control characters in it are shown, not sent."""
    plan = replace(RECORDED.plan, decode="d\x1b[31m\r\n\u202e")
    keep(own_cache, "a.jsonl", named("r", tenant="t\x07\x9b", plans=(Planned(0.0, plan),)))
    assert main(["explain", "r"]) == 0
    shown = capsys.readouterr().out
    assert all(c.isprintable() for c in shown.replace("\n", ""))
    assert r"d\x1b[31m\r\n\u202e" in shown


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """/admin/decisions over two requests, where the state file says that a cluster is."""
    clock = Clock()
    audit = audit_of(clock)
    for name in ("in-memory", "both?&="):
        clock.now_s = 100.0
        remote(clock, audit, request(name))
    scribe = Scribe(Pseudonyms(b"secret"), "smollm2", clock, Clock(5000.0))
    app = Starlette(routes=[Route("/admin/decisions", Decisions(audit.records, scribe).answer)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        state.write(tmp_path / "run", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_running_cluster_is_asked_first(
    cluster: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its memory has requests that are in no file, whatever characters their ids have."""
    keep(own_cache, "a.jsonl", RECORDED)
    for request_id in ("in-memory", "both?&=", "req-1"):
        assert main(["explain", request_id]) == 0
        assert f"{request_id}: " in capsys.readouterr().out
    assert main(["explain", "nobody"]) == 1
    assert f"the cluster at {cluster} knows its last 1,000" in capsys.readouterr().err


# ------------------------------------------------------------------ what is printed


def shown(entry: Entry) -> str:
    return "\n".join(lines(entry))


@given(entries, st.sampled_from([ASCII, Marks()]))
def test_whatever_is_recorded_can_be_shown(entry: Entry, marks: Marks) -> None:
    """No entry that can be read breaks the printing, and no line is endless."""
    printed = lines(entry, marks)
    assert printed
    assert all(line.isprintable() for line in printed)


@pytest.mark.parametrize("seconds", [1e308, 1.7e308, -1.0, 0.0, 5e-324])
def test_seconds_that_cannot_be_drawn_are_printed(seconds: float) -> None:
    """A file may hold any number; bars are left out or short, and nothing is raised."""
    parts = (
        Part(Action.QUEUE, "decode-0", seconds, seconds),
        Part(Action.COMPUTE, "decode-0", 0.0, seconds),
    )
    plan = replace(RECORDED.plan, parts=parts)
    assert max(map(len, lines(named("r", plans=(Planned(0.0, plan),), parts=parts)))) < 1000


def test_bars_stand_for_seconds() -> None:
    """On one scale: a part of half the time has half the width, and begins where it began."""
    parts = (
        Part(Action.QUEUE, "decode-0", 0.0, 0.25),
        Part(Action.COMPUTE, "decode-0", 0.25, 0.75),
    )
    plan = replace(RECORDED.plan, parts=parts)
    entry = named("r", plans=(Planned(0.0, plan),), parts=())
    queue, compute = (line for line in lines(entry, Marks("▒", "█")) if "▒" in line)
    assert (queue.count("▒"), compute.count("▒")) == (8, 24)
    assert compute.index("▒") - queue.index("▒") == 8


def test_a_plan_that_failed_is_told_before_the_one_that_was_carried_out() -> None:
    """What it was, and when the next one was made."""
    failed = replace(RECORDED.plan, shape=Shape.REMOTE)
    last = replace(RECORDED.plan, shape=Shape.LOCAL, prefill=None, reason=Reason.PREFILL_LOST)
    entry = named("r", plans=(Planned(0.001, failed), Planned(3.5, last)))
    printed = shown(entry)
    assert "plan 1 failed: remote on prefill-0 for decode-0; planned anew after 3.500 s" in printed
    assert "plan: local on decode-0" in printed
    assert "prefill_lost: the plan before lost its prefill replica" in printed


def test_tokens_from_elsewhere_than_planned_are_differences() -> None:
    """What the tier did not have in time was computed."""
    sources = {"prefill": {"device": 64, "computed": 936}, "decode": {"received": 999}}
    found = differences(named("r", sources=sources, parts=()))
    assert found == [
        "prefill-0: 936 tokens computed, 488 planned",
        "prefill-0: 0 tokens from host, 448 planned",
    ]


def test_what_went_as_planned_has_no_differences() -> None:
    """Nor has what is off by a few milliseconds."""
    parts = tuple(replace(part, seconds=part.seconds + 0.004) for part in RECORDED.plan.parts)
    entry = named("r", parts=parts)
    assert differences(entry) == []
    assert "what differed" not in shown(entry)


def test_a_first_step_is_part_of_the_predicted_handoff() -> None:
    """A link's curve ends at D's first token: both together are held against it."""
    predicted = RECORDED.plan.parts
    handoff = predicted[-1]
    half = handoff.seconds / 2
    moved = replace(handoff, seconds=half)
    step = Part(Action.STEP, handoff.replica, moved.end_s, half)
    assert differences(named("r", parts=(*predicted[:-1], moved, step))) == []


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ("aborted", "it did not come to its end: aborted"),
        ("deadline", "it did not come to its end: deadline of 30 s"),
        ("running", "it has not ended yet"),
    ],
)
def test_an_end_before_its_own_is_a_difference(outcome: str, says: str) -> None:
    """Who ended it, and at which limit."""
    asked = Asked(prompt_tokens=1000, timeout_s=30.0)
    entry = named("r", outcome=outcome, asked=asked, parts=(), sources={})
    assert differences(entry) == [says]


def test_a_request_without_a_token_says_so() -> None:
    """And what had been predicted."""
    entry = named("r", ttft_s=None, itl_mean_s=None, itl_max_s=None, parts=(), outcome="failed")
    assert "no token came; predicted 0.750 s" in shown(entry)


def test_a_policy_that_predicts_nothing_is_shown_without_bars() -> None:
    """The kill switch: no parts, no rivals, no prediction."""
    plan = replace(RECORDED.plan, parts=(), rivals=(), predicted_ttft_s=0.0, cost_s=0.0)
    printed = shown(named("r", plans=(Planned(0.0, plan),), parts=()))
    assert "not predicted" in printed
    assert "predicted     actual" not in printed
    assert "rival" not in printed
