"""The anchor's figures: from requests to a summary, from turns to rows."""

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "serve"


@pytest.fixture
def anchor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules, imported as the script imports them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def turn(system: str, ready_s: float) -> dict[str, Any]:
    return {"system": system, "ready_s": ready_s, "loads": {}}


def test_ours_aims_at_the_better_of_the_others(anchor: Any) -> None:
    """A figure of ours that only one of the two others reaches is a miss, and is told as one."""
    turns = [turn("ours", 30.0), turn("documented", 40.0), turn("tuned", 20.0)]
    rows = {row.name: row for row in anchor("anchor_rows").rows_of(turns, [])}
    mine = rows["time to ready: ours"]
    assert (mine.target, mine.ok) == (20.0, False)
    assert all(row.target is None and row.ok for name, row in rows.items() if row is not mine)


def test_a_row_is_the_median_of_its_turns_with_their_range(anchor: Any) -> None:
    """One odd turn moves the detail, not the value."""
    turns = [turn("ours", seconds) for seconds in (30.0, 31.0, 90.0)]
    (row,) = anchor("anchor_rows").rows_of(turns, [])
    assert row.value == 31.0
    assert "30 to 90 in 3 of 3 turns" in row.detail


def test_a_turn_on_a_busy_machine_is_told(anchor: Any) -> None:
    """Work of others that a turn began with is in the detail of its figures."""
    turns = [{**turn("ours", 30.0), "cores_busy_before": cores} for cores in (0.1, 1.26)]
    (row,) = anchor("anchor_rows").rows_of(turns, [])
    assert "1 began with up to 1.3 cores busy elsewhere" in row.detail


def test_a_system_that_did_not_start_says_why(anchor: Any) -> None:
    """A failure is a row without a value and with its reason, and misses no target of ours."""
    turns = [turn("ours", 30.0), {"system": "tuned", "failure": "no module named x"}]
    mine, theirs = anchor("anchor_rows").rows_of(turns, [])
    assert (mine.target, mine.ok) == (None, True)
    assert theirs.value is None
    assert theirs.detail == "not measured: no module named x"


def test_the_time_between_tokens_counts_tokens_and_not_chunks(anchor: Any) -> None:
    """Tokens that arrive bundled take as long on average as the same ones one by one."""
    sent = anchor("anchor_load").Sent
    single = sent(0.0, 1.4, [1.0, 1.1, 1.2, 1.3, 1.4], 5)
    bundled = sent(0.0, 1.4, [1.0, 1.4], 5)
    assert single.itl_s == pytest.approx(0.1)
    assert bundled.itl_s == pytest.approx(0.1)


def test_requests_are_told_apart_by_when_the_kill_met_them(anchor: Any) -> None:
    """In flight at the kill, new in the 30 s after, or neither; the first new answer is timed."""
    faults, sent = anchor("anchor_faults"), anchor("anchor_load").Sent
    done = [
        sent(0.0, 5.0, [1.0], 16),
        sent(8.0, 11.0, [10.5], 16),
        sent(9.0, 69.0, [], 0, "no end within 60 s"),
        sent(12.0, 14.0, [13.0], 16),
        sent(45.0, 46.0, [45.5], 16),
    ]
    report = faults.report(done, faults.Kill(at_s=10.0))
    flying, new = report["in_flight"], report["new"]
    assert (flying["requests"], flying["answered"], flying["timed_out"]) == (2, 1, 1)
    assert (new["requests"], new["answered"]) == (1, 1)
    assert report["first_new_answer_s"] == report["prefill_back_s"] == 4.0
