"""How a benchmark goes through its parts."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result, runner
from benchmarks.runner import Suite

GOOD = """
from pathlib import Path
from benchmarks.result import shown
def measure(quick):
    with Path(__file__).with_suffix(".ran").open("a") as ran:
        ran.write("x")
    return [shown("figure", 2.0, "s")]
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Parts `bad`, which fails, `good` and `slow`, of a benchmark that lies elsewhere."""
    # Python keeps modules by name: another one for each test.
    folder = tmp_path / "benchmarks" / f"at_{tmp_path.name}"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text("def measure(quick):\n    raise ValueError('no machine')\n")
    (folder / "good.py").write_text(GOOD)
    (folder / "slow.py").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(result, "commit", lambda: "abc")
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    return Suite(folder, ("bad", "good", "slow"), lambda *_: None, left_out=("slow",))


def run(suite: Suite, monkeypatch: pytest.MonkeyPatch, *words: str, quick: str = "0") -> int:
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    monkeypatch.setenv("QUICK", quick)
    return runner.main(suite, "help")


def report(suite: Suite, name: str = "latest") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((suite.results / f"{name}.json").read_text())["rows"]
    return rows


def test_a_part_that_fails_does_not_end_the_others(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report has their rows; the run says what failed, and ends as failed."""
    assert run(suite, monkeypatch) == 1
    assert [row["name"] for row in report(suite)] == ["figure", "figure"]
    assert "bad failed: ValueError: no machine" in capsys.readouterr().out


def test_a_part_is_measured_once_at_a_commit(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is asked for afresh; the report shows it either way."""
    ran = suite.folder / "good.ran"
    for words, times in (
        ((), 1),
        ((), 1),
        (("--only", "good", "--fresh"), 2),
        (("--only", "slow"), 2),
    ):
        run(suite, monkeypatch, *words)
        assert len(ran.read_text()) == times
        assert len(report(suite)) == 2


def test_a_smoke_run_is_told_apart(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves out what takes long, and has a report of its own."""
    run(suite, monkeypatch, quick="1")
    assert len(report(suite, "quick")) == 1
    assert not (suite.results / "latest.json").exists()


def test_unknown_parts_are_refused(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    with pytest.raises(SystemExit):
        run(suite, monkeypatch, "--only", "good,other")
    assert not (suite.folder / "good.ran").exists()


def test_a_link_to_a_folder_is_a_change_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that git does not know, such as to an environment elsewhere, has no text to read."""
    monkeypatch.setattr(result, "ROOT", tmp_path)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = result.commit()
    (tmp_path / "elsewhere").symlink_to("/")
    assert result.commit().startswith(f"{clean}+")
