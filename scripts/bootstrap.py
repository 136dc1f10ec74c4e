"""Make the virtual environment and the default model; do nothing where they are in place.

Runs on the system's Python, before anything is installed: standard library only.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from steps import count_packages_as_they_land, locked, step

ROOT = Path(__file__).resolve().parent.parent
# PyPI has only the CUDA build of torch for Linux; this one is tried where pip's indexes lack it.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# cpu: installed packages 3.1 GB, pip's cache of their wheels 1.2 GB, the model 0.6 GB, and room.
NEEDED_BYTES = {"cpu": 6_000_000_000, "dev": 500_000_000}


class SetupError(Exception):
    """A step that failed; the message ends with the remedy."""


def set_up(venv: Path, cache: Path, dev: bool) -> None:
    """Bring the environment to the locked sets, then export the model."""
    names = ("cpu.txt", "dev.txt") if dev else ("cpu.txt",)
    locks = [ROOT / "requirements" / name for name in names]
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "setup.lock"):
        for lock in locks:
            stamp = venv / f".stamp-{lock.stem}-{digest(lock)}"
            if not stamp.exists():
                install(venv, lock, stamp)
        # Free when the model is in place.
        model = [str(venv / "bin" / "python"), "-m", "cluster.model", "--cache", str(cache)]
        if run(model) != 0:
            raise SetupError("the model was not made; the lines above say why")


def digest(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12]


def install(venv: Path, lock: Path, stamp: Path) -> None:
    """Install one locked set; `.installing` marks a venv that a killed run left half full."""
    check_disk(venv, NEEDED_BYTES[lock.stem])
    busy = venv / ".installing"
    if busy.exists() or not pip_works(venv):
        make_venv(venv)
    busy.touch()
    pins = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    # First and alone: the extra index is asked for this package only.
    for pin in pins:
        if pin.startswith("torch=="):
            install_torch(venv, pin)
    with step(f"install {sum(map(bool, pins))} packages of {lock.relative_to(ROOT)}"):
        with count_packages_as_they_land(venv):
            status = pip(venv, ["-r", str(lock)])
        if status != 0:
            raise SetupError(
                f"{lock.name}: pip exited with {status}; check the network and pip's "
                "index settings (pip config list), then run make again"
            )
    for old in venv.glob(f".stamp-{lock.stem}-*"):
        old.unlink()
    stamp.touch()
    busy.unlink()


def install_torch(venv: Path, pin: str) -> None:
    with step(f"install {pin}"):
        # Fails in a second where there is only the CUDA build; its error would alarm.
        if pip(venv, ["--dry-run", "--quiet", pin], stderr=subprocess.DEVNULL) == 0:
            status = pip(venv, [pin])
        else:
            print(f"    not in pip's configured indexes; trying {TORCH_INDEX}", flush=True)
            status = pip(venv, [pin], {"PIP_EXTRA_INDEX_URL": TORCH_INDEX})
        if status != 0:
            raise SetupError(
                f"{pin}: pip exited with {status}; let this machine reach {TORCH_INDEX}, "
                "or put the wheel in a folder that PIP_FIND_LINKS names"
            )


def make_venv(venv: Path) -> None:
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv}: holds files and is no venv; remove it or set VENV to another")
    with step(f"make a virtual environment in {venv}"):
        if run([sys.executable, "-m", "venv", "--clear", str(venv)]) != 0:
            raise SetupError(
                f"{venv}: Python {sys.version.split()[0]} could not make it; "
                "install its venv module (Debian: apt install python3.11-venv)"
            )


def pip_works(venv: Path) -> bool:
    command = [str(venv / "bin" / "python"), "-c", "import pip._internal"]
    return Path(command[0]).exists() and run(command, stderr=subprocess.DEVNULL) == 0


def pip(
    venv: Path, args: list[str], env: Mapping[str, str] | None = None, stderr: int | None = None
) -> int:
    """Install without dependencies: the locks are complete, and metadata asks for CUDA builds."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-input", "--no-deps"]
    return run([*command, "--disable-pip-version-check", *args], env, stderr)


def run(command: list[str], env: Mapping[str, str] | None = None, stderr: int | None = None) -> int:
    merged = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=ROOT, env=merged, stderr=stderr, check=False).returncode


def check_python() -> None:
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise SetupError(
            f"Python {sys.version.split()[0]} found, 3.11 or 3.12 wanted; make PYTHON=python3.11"
        )


def check_disk(venv: Path, needed: int) -> None:
    place = next(path for path in (venv, *venv.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SetupError(
            f"{place}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB wanted; "
            "free some space, or set VENV and BREAKEVEN_CACHE to another disk"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--dev", action="store_true", help="add what the tests and checks need")
    args = parser.parse_args()
    # As Ctrl-C: an exception, on which subprocess.run takes pip down too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_python()
        set_up(args.venv.absolute(), args.cache.absolute(), args.dev)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run make again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
