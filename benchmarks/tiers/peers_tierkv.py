"""tierKV's codec on the KV that ours are measured on (`codecs`): bytes, error and speed.

Its native half is installed into an environment of its own in the cache, from the package index.
The codec (`TurboQuant`: int8 with a scale for each group) takes the fp32 bytes of a block as its
connector lays them out: layer by layer the keys, then the values, each (tokens, heads, head size).
Groups are as wide as a head, as its configuration says. Payloads carry no checksum; ours do.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import model
from benchmarks.result import Row, Store, shown, spread
from cluster.config import cache_dir

TIERKV = "tierkv-core==0.1.0"
PROGRAM = Path(__file__).with_name("peers_tierkv_program.py")
# What of tierKV is not measured, and why.
NO_RESTORE = (
    "not measured: tierKV 0.1.0's connector stores from caches whose first dimension is 2, keys "
    "and values; that of vLLM 0.32's CPU engine is the number of blocks"
)


class Absent(Exception):
    """tierKV cannot be had here, or does not do what it is asked; says why."""


def measured(store: Store, quick: bool) -> list[Row]:
    """Its rows; one that says why, where it cannot be measured."""
    restore = Row("tierKV restore", None, "ms", None, True, NO_RESTORE)
    try:
        done = store.get("tierkv", lambda: _encoded(3 if quick else 15))
    except Absent as error:
        return [Row("tierKV codec", None, "MB/s", None, True, f"not measured: {error}"), restore]
    return [*rows(done), restore]


def rows(done: dict[str, Any]) -> list[Row]:
    """Size, error and speed."""
    detail = f"{TIERKV}, groups of {done['group']}; {done['encoded_bytes']} bytes a block"
    found = [shown("tierKV ratio", done["encoded_bytes"] / done["block_bytes"], "", detail)]
    for direction in ("encode", "decode"):
        speeds = [each / 1e6 for each in done[f"{direction}_bytes_s"]]
        found.append(
            shown(f"tierKV {direction}", statistics.median(speeds), "MB/s", spread(speeds))
        )
    for name in ("keys", "values"):
        found.append(shown(f"tierKV {name} SNR", done[f"{name}_snr_db"], "dB"))
    return found


def snr_db(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Signal to noise over all of it."""
    signal = np.square(before, dtype=np.float64).sum()
    noise = np.square(before.astype(np.float64) - after).sum()
    return float(10 * np.log10(signal / noise))


def _encoded(repeats: int) -> dict[str, Any]:
    python = _environment()
    blocks = _blocks()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        np.save(folder / "blocks.npy", blocks)
        group = blocks.shape[-1]
        command = [str(python), str(PROGRAM), str(folder), str(group), str(repeats)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise Absent(f"{TIERKV}: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}")
        done: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        decoded = np.load(folder / "decoded.npy")
    for at, side in enumerate(("keys", "values")):
        done[f"{side}_snr_db"] = snr_db(blocks[:, :, at], decoded[:, :, at])
    return {**done, "group": group, "block_bytes": blocks[0].nbytes}


def _blocks() -> NDArray[np.float32]:
    """(blocks, layers, 2, tokens, heads, head size) of the default model."""
    from benchmarks.tiers.codecs import numbers, real_pages

    pages, shape = real_pages(model())
    sides = [[numbers(page, shape, side) for page in pages] for side in (shape.keys, shape.values)]
    # Each is (layers, heads, tokens, head size).
    stacked = np.stack([np.stack([side.numpy() for side in each]) for each in sides], axis=2)
    return np.ascontiguousarray(stacked.swapaxes(3, 4))


def _environment() -> Path:
    """A Python that has tierKV, made once in the cache. Raises `Absent`."""
    python = cache_dir() / f"bench-{TIERKV.replace('==', '-')}" / "bin" / "python"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(python.parents[1])],
        [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", TIERKV, "numpy"],
    ]
    for command in [] if _has_tierkv(python) else commands:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["no message"])[-1]
            raise Absent(f"{TIERKV} cannot be installed: {last}")
    return python


def _has_tierkv(python: Path) -> bool:
    probe = [str(python), "-c", "import numpy, tierkv_core"]
    return (
        python.exists() and not subprocess.run(probe, capture_output=True, check=False).returncode
    )
