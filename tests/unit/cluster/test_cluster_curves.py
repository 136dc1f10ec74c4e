"""`breakeven calibrate` draws what /admin/curves tells, or says what it lacks."""

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.curve_plot import MOST_TIERS, check, draw, pictured, tier_rows
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


def _with_tiers(report: dict[str, Any]) -> dict[str, Any]:
    """Host memory without points, and a vault with a lossy codec's curve beside its own."""
    host = {"latency_s": 0.005, "bytes_per_s": 4e9, "crossover_tokens": 3.0, "samples": 0}
    lossy = {**host, "crossover_tokens": 41.0, "points": [[46_080_000, 0.05], [4_608_000, 0.01]]}
    vault = {**host, "crossover_tokens": None, "points": [[46_080_000, 0.2]], "lossy": lossy}
    tiers = {"decode-0": {"host": {**host, "points": []}, "vault": vault}}
    return {**report, "tiers": tiers}


def _panels(report: dict[str, Any]) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in pictured(report).axes if axes.get_title()}


def test_every_tier_has_a_panel_and_every_codec_of_one() -> None:
    """Beside those of links: the fit against computing on whoever fetches, the samples as dots, and
    the crossover where there is one."""
    panels = _panels(_with_tiers(_report(1)))
    drawn = ["decode-0/host", "decode-0/vault", "decode-0/vault/lossy"]
    assert list(panels) == ["computing a prompt", "prefill-0->decode-0", *drawn]
    dots = {
        name: [each.get_offsets().tolist() for each in panels[name].collections] for name in drawn
    }
    assert dots["decode-0/host"] == []
    assert dots["decode-0/vault"] == [[[1000.0, 0.2]]]
    assert dots["decode-0/vault/lossy"] == [[[1000.0, 0.05], [100.0, 0.01]]]
    for name, crossover in zip(drawn, (3, None, 41), strict=True):
        lines = {line.get_label(): line for line in panels[name].lines}
        marks = {"fetching", "computing"} | ({f"crossover at {crossover}"} if crossover else set())
        assert set(lines) == marks
        tokens, seconds = lines["fetching"].get_data()
        assert seconds[0] == pytest.approx(0.005)
        assert seconds[-1] == pytest.approx(0.005 + tokens[-1] * 46_080 / 4e9)
        assert lines["computing"].get_ydata()[0] == pytest.approx(PREFILL["base_s"])


def test_many_tiers_are_drawn_in_part() -> None:
    """As many as there is room for, by name."""
    report = _with_tiers(_report(0))
    one = report["tiers"]["decode-0"]
    report["tiers"] = {f"decode-{n:02}": one for n in range(40)}
    assert len(_panels(report)) == 1 + MOST_TIERS


def test_the_table_has_a_row_for_each_tier_and_codec() -> None:
    """By the names of the panels."""
    assert set(tier_rows(_with_tiers(_report(0))["tiers"])) == {
        "decode-0/host",
        "decode-0/vault",
        "decode-0/vault/lossy",
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
