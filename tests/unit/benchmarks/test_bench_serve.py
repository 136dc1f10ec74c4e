"""What the serving benchmark makes of what it measures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result
from benchmarks.result import Store, at_least, at_most
from benchmarks.serve.conversations import reusable
from benchmarks.serve.interference import waited
from benchmarks.serve.load import Answer, Arrival, undelayed


def _event(choice: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def _said(prompt: list[int], answer: list[int]) -> Answer:
    first = {"delta": {"role": "assistant"}, "prompt_token_ids": prompt}
    content = _event(first) + _event({"delta": {"content": "x"}, "token_ids": answer})
    return Answer(0.0, 200, arrivals=[Arrival(1.0, content)])


def test_events_are_timed_by_their_last_byte() -> None:
    """However TCP cuts a stream, an event came when it was whole, and a role is no token."""
    stream = _event({"delta": {"role": "assistant"}})
    stream += _event({"delta": {"content": "a"}}) + _event({"delta": {"content": "b"}})
    cut = len(stream) - 5
    answer = Answer(1.0, 200, arrivals=[Arrival(2.0, stream[:cut]), Arrival(3.5, stream[cut:])])
    assert answer.token_times_s == [2.0, 3.5]
    assert (answer.ttft_s, answer.gaps_s, answer.text) == (1.0, [1.5], "ab")


def test_an_error_in_a_stream_is_no_answer() -> None:
    """A server that fails behind its 200 does not count as quick."""
    answer = Answer(0.0, 200, arrivals=[Arrival(1.0, b'data: {"error": "gone"}\n\n')])
    with pytest.raises(RuntimeError, match="gone"):
        answer.check()


def test_whole_blocks_of_the_common_prefix_are_reusable() -> None:
    """The KV of an answer's last token is nobody's, and half a block is none."""
    prompt, answer = list(range(60)), list(range(60, 65))
    turn = _said(prompt, answer)
    assert reusable([turn], list(range(100))) == 64
    assert reusable([_said(prompt, answer[:4])], list(range(100))) == 32
    assert reusable([turn], [*range(40), *range(500, 560)]) == 32
    assert reusable([], list(range(100))) == 0


def test_the_last_token_of_a_prompt_is_never_reused() -> None:
    """An engine computes it for its logits, and with it all of its block."""
    assert reusable([_said(list(range(64)), [1, 2])], list(range(64))) == 32


def test_a_stall_weighs_what_its_reader_waits() -> None:
    """One gap of 5 s among 199 of 25 ms is half of the time, though not one gap in a hundred."""
    gaps = [0.025] * 199 + [5.0]
    assert waited(gaps, 0.4) == 0.025
    assert waited(gaps, 0.6) == 5.0


def test_targets_have_a_direction() -> None:
    """A figure on its target meets it, whichever side is the good one."""
    assert at_most("x", 5.0, "ms", 5.0).ok
    assert not at_most("x", 5.1, "ms", 5.0).ok
    assert at_least("x", 0.95, "x", 0.95).ok
    assert not at_least("x", 0.94, "x", 0.95).ok


def test_an_interrupted_run_goes_on_behind_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is not measured again at its commit, and at another one it is."""
    module = str(tmp_path / "part.py")
    monkeypatch.setattr(result, "commit", lambda: "abc")
    Store(module, quick=False).get("first", lambda: {"wall_s": 1.5})
    again = Store(module, quick=False)
    assert again.get("first", lambda: pytest.fail("measured twice")) == {"wall_s": 1.5}
    assert "first" not in Store(module, quick=True)
    monkeypatch.setattr(result, "commit", lambda: "def")
    assert "first" not in Store(module, quick=False)


def test_a_client_runs_before_the_servers_it_measures_and_then_as_before() -> None:
    """While a client is open its thread is scheduled in real time; no child of it is, and
    afterwards it is not either."""
    if not _may_be_scheduled_in_real_time():
        pytest.skip("no permission for real-time scheduling here")
    before = os.sched_getscheduler(0)
    with undelayed():
        within = os.sched_getscheduler(0)
        child = subprocess.check_output(
            [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"], text=True
        )
    assert within & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
    assert int(child) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) == before


def _may_be_scheduled_in_real_time() -> bool:
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    tried = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    return tried.returncode == 0
