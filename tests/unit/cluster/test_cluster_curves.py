"""`breakeven calibrate` draws what /admin/curves tells, or says what it lacks."""

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.curve_plot import check, draw
from cluster.errors import PlotError

PREFILL = {"base_s": 0.02, "per_token_s": 0.002, "per_token2_s": 1e-7, "step_s": 0.02, "samples": 2}


def _report(links: int) -> dict[str, Any]:
    link = {"latency_s": 0.01, "samples": 1, "shifts": 0}
    crossed = {"bytes_per_s": 1e9, "crossover_tokens": 12.5, "points": [[46_080_000, 0.06]]}
    never = {"bytes_per_s": None, "crossover_tokens": None, "points": []}
    return {
        "prefill": {
            "prefill-0": {**PREFILL, "points": []},
            "decode-0": {**PREFILL, "points": [[500, 0, 1.1], [20, 4000, 0.1]]},
        },
        "links": {
            f"prefill-{n}->decode-{n}": {**link, **(never if n else crossed)} for n in range(links)
        },
        "tiers": {},
        "replicas": [{"name": "decode-0", "kv_bytes_per_token": 46_080}],
    }


@pytest.mark.parametrize("links", [0, 1, 5, 40])
def test_every_link_has_a_panel(links: int, tmp_path: Path) -> None:
    """With points or without, with a crossover or none, of a replica that is there or gone."""
    path = tmp_path / "curves.png"
    check(path)
    draw(_report(links), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"matplotlib is not installed; `pip install matplotlib`"):
        check(tmp_path / "curves.png")


def test_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    """A folder that is not there, before anything is measured; or a kind of picture that nobody
    knows."""
    with pytest.raises(PlotError, match=r"there is no folder .*missing; make it first"):
        check(tmp_path / "missing" / "curves.png")
    with pytest.raises(PlotError, match=r"curves.nonsense: not written"):
        draw(_report(1), tmp_path / "curves.nonsense")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9", "soon"])
def test_seconds_that_make_no_sense_are_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is taken."""
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--seconds", seconds])
    assert "from 0.1 to 300" in capsys.readouterr().err


def test_without_a_cluster_it_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to measure."""
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path))
    monkeypatch.setattr("cluster.curves.address", lambda: "http://127.0.0.1:1")
    assert cli.main(["calibrate"]) == 1
    assert "start one with `breakeven serve`" in capsys.readouterr().err
