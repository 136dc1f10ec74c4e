"""The figures of predictions, from an audit."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from benchmarks.calibration import ALL, Point, first_tokens, main, parts, quantile
from kv.audit import Entry, Planned, encode, read
from kv.parts import Action
from kv.plan import Shape
from router.context import ServiceClass

FIRST = Path(__file__).parents[1] / "kv" / "audit-v1.jsonl"
(RECORDED,) = read([FIRST.read_bytes()], lambda bad: pytest.fail(str(bad)))


def entry(predicted_s: float, actual_s: float | None, shape: Shape = Shape.LOCAL) -> Entry:
    plan = replace(RECORDED.plan, shape=shape, predicted_ttft_s=predicted_s)
    plans = (Planned(0.0, plan),)
    return msgspec.structs.replace(RECORDED, plans=plans, ttft_s=actual_s)


def test_points_are_grouped_by_shape() -> None:
    """Those without a first token, without a prediction and with a second plan are left out, and so
    are batch requests."""
    gave_way = msgspec.structs.replace(entry(1.0, 5.0), service_class=ServiceClass.BATCH)
    again = msgspec.structs.replace(entry(1.0, 1.0), plans=(*RECORDED.plans, *RECORDED.plans))
    given = [entry(1.0, 2.0), entry(2.0, 1.0, Shape.REMOTE), entry(1.0, None), entry(0.0, 1.0)]
    assert parts([gave_way]) == {}
    assert first_tokens([*given, again, gave_way]) == {
        "local": [Point(1.0, 2.0)],
        "remote": [Point(2.0, 1.0)],
        ALL: [Point(1.0, 2.0), Point(2.0, 1.0)],
    }


def test_errors_are_of_what_happened() -> None:
    """Twice as long as predicted is 50 % off, half as long 100 %."""
    assert (Point(1.0, 2.0).error, Point(1.0, 2.0).ratio) == (0.5, 2.0)
    assert (Point(2.0, 1.0).error, Point(2.0, 1.0).ratio) == (1.0, 0.5)


def test_a_handoff_is_judged_with_its_first_step() -> None:
    """And parts that have no counterpart say nothing of a curve."""
    found = parts([RECORDED])
    assert set(found) == {Action.QUEUE, Action.FETCH, Action.COMPUTE, Action.HANDOFF}
    assert found[Action.HANDOFF] == [Point(0.0625, 0.125)]
    assert found[Action.QUEUE] == [Point(0.125, 0.25)]


@pytest.mark.parametrize(
    ("values", "share", "is_"),
    [
        ([3.0], 0.9, 3.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_a_quantile_is_one_of_the_values(values: list[float], share: float, is_: float) -> None:
    """The smallest that this share does not exceed."""
    assert quantile(values[::-1], share) == is_


def test_an_audit_becomes_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all files of a folder; a bad line is told and read past."""
    for number, name in enumerate(("a.jsonl", "a.1.jsonl")):
        kept = [entry(1.0 + number, 1.5), entry(1.0, 2.0, Shape.REMOTE)]
        (tmp_path / name).write_bytes(b"".join(map(encode, kept)) + b"torn\n")
    picture = tmp_path / "out.png"
    assert main([str(tmp_path), "--plot", str(picture)]) == 0
    told = capsys.readouterr()
    assert "a.1.jsonl, line 3" in told.err
    rows = {line.split()[0]: line.split() for line in told.out.splitlines() if line}
    assert rows["all"][1] == "4"
    assert rows["remote"][1:] == ["2", "50.0%", "50.0%", "2.00"]
    assert rows["compute"][1] == "4"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_audit_without_predictions_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So is one that is not there."""
    (tmp_path / "a.jsonl").write_bytes(encode(entry(1.0, None)))
    assert main([str(tmp_path)]) == 1
    assert "none of 1 requests" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err
