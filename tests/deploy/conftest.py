"""Tools that `make tools` fetches; a test whose tool is not there is skipped, and says so."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.chart import Helm

Tool = Callable[[str, str], str]


@pytest.fixture(scope="session")
def tool(cache_dir: Path) -> Tool:
    """The path of a program, by the folder and the name that scripts/tools.py gives it."""

    def find(folder: str, program: str) -> str:
        path = cache_dir / "tools" / folder / program
        if not path.exists():
            pytest.skip(
                f"{folder} is not in place: `make tools` fetches it, and says why it cannot"
            )
        return str(path)

    return find


@pytest.fixture(scope="session", params=["helm3", "helm4"])
def helm(
    request: pytest.FixtureRequest, tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> Helm:
    """A real Helm of each version, with folders of its own."""
    home = tmp_path_factory.mktemp(request.param)
    env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "KUBECONFIG": "/dev/null"}
    made = Helm(tool(request.param, "helm"), env)
    said = subprocess.run([made.program, "version", "--short"], capture_output=True, check=True)
    assert said.stdout.startswith(f"v{request.param[-1]}.".encode())
    return made
