"""What nodes of a Ray cluster must have alike."""

from dataclasses import replace
from pathlib import Path

from cluster.survey import Facts, facts, unlike

HERE = Facts("10.0.0.1", "abc", {"python": "3.11", "vllm": "0.32.0", "nixl": "1.5.1"}, True)
THERE = replace(HERE, node="10.0.0.2")


def test_nodes_that_are_alike_may_serve() -> None:
    """Any number of them."""
    assert unlike(HERE, [HERE, THERE, THERE], "/models/m") is None


def test_the_first_difference_is_told_with_its_node() -> None:
    """Another version, a package that is not there, other code, no model."""
    older = replace(THERE, versions={**HERE.versions, "nixl": "1.4.0"})
    without = replace(THERE, versions={"python": "3.11", "nixl": "1.5.1"})
    said = unlike(HERE, [THERE, older], None) or ""
    assert said.startswith("node 10.0.0.2 has nixl 1.4.0, and 1.5.1 is here (10.0.0.1): ")
    assert "node 10.0.0.2 has vllm none" in (unlike(HERE, [without], None) or "")
    assert "another version of this code" in (
        unlike(HERE, [replace(THERE, code="abd")], None) or ""
    )
    lacking = unlike(HERE, [replace(THERE, has_model=False)], "/models/m") or ""
    assert lacking.startswith("node 10.0.0.2 has no folder /models/m: ")


def test_a_node_tells_what_it_runs(tmp_path: Path) -> None:
    """The same twice; a folder that is there, one that is not, and none that is wanted."""
    mine = facts("10.0.0.1", str(tmp_path))
    assert mine == facts("10.0.0.1", None)
    assert not facts("10.0.0.1", str(tmp_path / "none")).has_model
    assert mine.versions["ray"] != "none"
    assert len(mine.code) == 64
