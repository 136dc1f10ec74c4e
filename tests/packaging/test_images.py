"""The Dockerfiles, as far as it shows without Docker."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def _instructions(file: Path) -> list[tuple[str, str]]:
    """Each with its words; lines that go on are one."""
    text = file.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def _copied(file: Path) -> list[tuple[list[str], str]]:
    """Sources and target of each COPY."""
    found = [words.split() for name, words in _instructions(file) if name == "COPY"]
    return [(words[:-1], words[-1]) for words in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_not_left_out(file: Path) -> None:
    """Of the checkout, and not of what .dockerignore keeps from Docker."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    sources = [source for each, _ in _copied(file) for source in each]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(Path(source).is_relative_to(name) for name in ignored), source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_package_is_copied(file: Path) -> None:
    """And each file that a RUN names is there by then."""
    packages = {"kv", "workers", "router", "cluster", "configs"}
    there: set[str] = set()
    for name, words in _instructions(file):
        if name == "COPY":
            *sources, target = words.split()
            there |= {os.path.normpath(source) for source in sources}
            assert target.rstrip("/.") in {*map(os.path.dirname, sources), *sources}
        elif name == "RUN":
            for path in re.findall(r"(?:scripts|requirements)/[\w./-]+", words):
                assert any(Path(path).is_relative_to(each) for each in there), path
    assert packages <= there


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_does_not_run_as_root(file: Path) -> None:
    """By number, so that Kubernetes can tell; the user that the chart's pods run as."""
    users = [words for name, words in _instructions(file) if name == "USER"]
    asked = re.findall(r"runAsUser: (\d+)", (ROOT / "k8s" / "cpu.yaml").read_text())
    assert set(users) == set(asked)
    assert len(users) == 1


def test_the_chart_says_which_ray_is_in_the_image() -> None:
    """KubeRay goes by it; nodes of several versions do not meet."""
    values = yaml.safe_load((ROOT / "helm" / "breakeven" / "values.yaml").read_text())
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements" / "cpu.txt").read_text(), re.M)
    assert locked is not None
    assert values["rayVersion"] == locked[1] == importlib.metadata.version("ray")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_built_under_the_tag_that_the_chart_asks_for(file: Path) -> None:
    """By the command in its first line."""
    chart = yaml.safe_load((ROOT / "helm" / "breakeven" / "Chart.yaml").read_text())
    first = file.read_text().splitlines()[0]
    assert f"-f docker/{file.name} -t breakeven:{chart['appVersion']} ." in first
