"""What the rows of batch requests say of samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.breakeven import plots
from benchmarks.breakeven.batch import QUICK, rows
from benchmarks.result import raw_folder

SIZE = replace(QUICK, repeats=2)


def window(ttft_s: float, batch_done: int = 0) -> dict[str, Any]:
    """Ten people in ten seconds."""
    told = {"wall_s": 10.0, "client_share": 0.1, "batch_done": batch_done}
    return {
        **told,
        "ttft_s": [ttft_s] * 10,
        "gaps_s": [0.02] * 10,
        "batch_ttft_s": [1.0] * batch_done,
    }


def results(**changed: Any) -> dict[str, Any]:
    """Saturation is two a second; people take one, and batch requests nine tenths of the other."""
    measured: dict[str, Any] = {"saturation": {"requests_per_s": 2.0}}
    for number in range(SIZE.repeats):
        measured |= {f"alone-{number}": window(0.4), f"beside-{number}": window(0.48, 9)}
    for name, share in (("alone", 0.5), ("beside", 0.495)):
        measured[f"talk-{name}"] = {"turns": [], "share": share, "batch_done": 7}
    return {**measured, **changed}


def values(measured: dict[str, Any]) -> list[tuple[float | None, bool]]:
    return [(row.value, row.ok) for row in rows(measured.__getitem__, SIZE) if row.target]


def test_each_target_has_a_row() -> None:
    """What people wait for, what batch requests get, and what stays cached: with, over without."""
    assert values(results()) == [
        (pytest.approx(1.2), True),
        (pytest.approx(0.9), True),
        (pytest.approx(0.99), True),
    ]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"beside-0": window(0.6, 9), "beside-1": window(0.6, 9)}, 0),
        ({"beside-0": window(0.48, 5)}, 1),
        ({"talk-beside": {"turns": [], "share": 0.4, "batch_done": 7}}, 2),
    ],
)
def test_a_target_that_is_missed_is_told(changed: dict[str, Any], missed: int) -> None:
    """And no other with it."""
    assert [ok for _, ok in values(results(**changed))] == [at != missed for at in range(3)]


def test_its_picture_is_drawn(tmp_path: Path) -> None:
    """Of whatever windows there are."""
    raw = raw_folder(tmp_path, True)
    raw.mkdir(parents=True)
    (raw / "batch.json").write_text(json.dumps({"results": results()}))
    plots.draw(tmp_path, True)
    assert (raw / "batch.png").read_bytes().startswith(b"\x89PNG")
