"""Our plain top-level packages come from this checkout and clash with nobody's."""

import importlib.util
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "breakeven"


def declared_packages() -> list[str]:
    """The packages that a wheel of this project would hold."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages: list[str] = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return packages


@pytest.mark.parametrize("name", declared_packages())
def test_package_resolves_inside_the_checkout(name: str) -> None:
    """An import takes our file, not one of the same name elsewhere on the path."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None, f"{name} has no __init__.py"
    assert Path(spec.origin) == ROOT.joinpath(*name.split("."), "__init__.py")


@pytest.mark.parametrize("name", sorted({name.split(".")[0] for name in declared_packages()}))
def test_no_other_distribution_owns_the_name(name: str) -> None:
    """Installing us beside the locked sets overwrites nothing."""
    owners = set(packages_distributions().get(name, []))
    assert owners <= {DISTRIBUTION}


def test_every_package_is_declared() -> None:
    """A folder with modules that pyproject.toml forgets would be missing from the wheel."""
    declared = declared_packages()
    tops = {name.split(".")[0] for name in declared}
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in tops
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(declared)
