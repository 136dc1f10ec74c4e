"""A wheel of this checkout works away from it."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from cluster.home import ROOT

pytestmark = pytest.mark.packaging

_LOOK = """
import json, pathlib, cluster.config, cluster.model, cluster.home
config = cluster.config.load(None, {})
print(json.dumps({
    "code": cluster.config.__file__, "default": str(cluster.config.DEFAULT),
    "pin": cluster.model.PIN.exists(), "cache": str(cluster.config.cache_dir()),
    "decode": config.decode.replicas, "checkout": cluster.home.IN_CHECKOUT,
}))
"""


def test_a_wheel_carries_its_configuration(tmp_path: Path) -> None:
    """Installed into an environment of its own, away from the checkout, the default
    configuration loads, the model's pin is there and the cache is the user's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # setuptools builds beside the source
    for name in ("kv", "workers", "router", "cluster", "configs", "requirements"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    wheel = next(tmp_path.glob("breakeven-*.whl"))
    home = tmp_path / "venv"
    venv.create(home, system_site_packages=False, with_pip=True)
    python = home / "bin" / "python"
    install = ["-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    subprocess.run([str(python), *install, str(wheel)], check=True, cwd=tmp_path)
    # The dependencies come from this environment: only our own code is under test.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (next((home / "lib").glob("python3*")) / "site-packages" / "deps.pth").write_text(packages)
    env = {k: v for k, v in os.environ.items() if not k.startswith("BREAKEVEN_")}
    env["HOME"] = str(tmp_path)
    seen = json.loads(
        subprocess.run(
            [str(python), "-c", _LOOK], cwd=tmp_path, env=env, check=True, capture_output=True
        ).stdout
    )
    assert seen["code"].startswith(str(home))
    assert seen["default"].startswith(str(home))
    assert seen["cache"] == str(tmp_path / ".cache" / "breakeven")
    assert (seen["pin"], seen["decode"], seen["checkout"]) == (True, 1, False)
