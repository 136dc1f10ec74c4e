"""Codecs on real KV: bytes, error and speed of each, and the links on which each pays.

`python benchmarks/tiers/codecs.py` prints its rows; `--write` keeps them as results/codecs.json.
The KV is that of the default model over 1,024 tokens of this project's documents, computed by
transformers in fp32 and laid out in blocks of 32 tokens as vLLM's CPU attention does. Speeds are of
whole frames, checksums included, in bytes of fp32 page per second of one thread's CPU time; all
blocks together are larger than most last-level caches.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.result import ROOT, Row, at_least, commit, machine, shown
from cluster.model import ensure_default_model
from kv.codecs.codec import Codec, CodecName
from kv.codecs.frame import decode_frame, encode_frame, frame_bytes
from kv.codecs.page import Dtype, PageShape, Region
from kv.codecs.table import CODECS
from kv.codecs.tensors import region, tensor

RESULTS = Path(__file__).parent / "results"
TEXTS = ("docs/architecture.md", "docs/operations.md")
TOKENS, BLOCK_TOKENS = 1024, 32
# MB/s, encode and decode: issue 4, "Speed".
TARGETS = {"int8": 2000, "tq4": 300}


@dataclass(frozen=True, slots=True)
class Speed:
    """Both directions of one codec: bytes of page a CPU second, a sample for each repeat."""

    encode: list[float]
    decode: list[float]


def measure(quick: bool) -> list[Row]:
    """Rows of every codec."""
    torch.set_num_threads(1)
    cache = Path(os.environ.get("BREAKEVEN_CACHE") or ROOT / ".cache")
    pages, shape = real_pages(ensure_default_model(cache))
    repeats = 3 if quick else 15
    raw = CODECS[CodecName.RAW]
    raw_speed, restored = _speed(raw, pages, shape, repeats)
    rows = _speed_rows(raw, raw_speed, len(pages))
    rows.append(at_least("raw_exact", float(restored == pages), "", 1))
    for codec in CODECS.values():
        if codec is not raw:
            rows += _lossy_rows(codec, pages, shape, repeats, raw_speed)
    return rows


def real_pages(folder: Path) -> tuple[list[bytearray], PageShape]:
    """Blocks of the model in `folder`, as the CPU engine's pages hold them."""
    # Read by huggingface_hub when it is first imported: hence before transformers.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    text = "\n".join((ROOT / name).read_text() for name in TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        layers = model(ids, use_cache=True).past_key_values.layers
    keys = torch.stack([layer.keys[0] for layer in layers])
    values = torch.stack([layer.values[0] for layer in layers])
    n_layers, kv_heads, tokens, head_dim = keys.shape
    shape = PageShape(n_layers, BLOCK_TOKENS, kv_heads, head_dim, Dtype.FP32)
    blocks = [slice(at, at + BLOCK_TOKENS) for at in range(0, tokens, BLOCK_TOKENS)]
    return [_page(shape, keys[:, :, block], values[:, :, block]) for block in blocks], shape


def _page(shape: PageShape, keys: Any, values: Any) -> bytearray:
    page = bytearray(shape.page_bytes)
    numbers(page, shape, shape.keys).copy_(keys)
    numbers(page, shape, shape.values).copy_(values)
    return page


def numbers(page: bytearray, shape: PageShape, where: Region) -> Any:
    return region(tensor(page, torch.float32), shape, where, "LHTD")


def _lossy_rows(
    codec: Codec, pages: list[bytearray], shape: PageShape, repeats: int, raw: Speed
) -> list[Row]:
    speed, restored = _speed(codec, pages, shape, repeats)
    ratio = frame_bytes(codec, shape) / shape.page_bytes
    detail = f"{frame_bytes(codec, shape)} bytes a block, of {shape.page_bytes}"
    rows = [shown(f"{codec.name}_ratio", ratio, "", detail), *_speed_rows(codec, speed, len(pages))]
    for name, where in (("keys", shape.keys), ("values", shape.values)):
        rows.append(_snr_row(f"{codec.name}_{name}_snr", pages, restored, shape, where))
    return rows + _crossovers(codec, ratio, speed, raw)


def _speed(
    codec: Codec, pages: list[bytearray], shape: PageShape, repeats: int
) -> tuple[Speed, list[bytearray]]:
    """Its speed over all pages, and what came back."""
    frames = [bytearray(frame_bytes(codec, shape)) for _ in pages]
    restored = [bytearray(shape.page_bytes) for _ in pages]

    def encode() -> None:
        for page, frame in zip(pages, frames, strict=True):
            encode_frame(codec, page, shape, frame)

    def decode() -> None:
        for frame, page in zip(frames, restored, strict=True):
            decode_frame(frame, shape, CODECS, page)

    size_bytes = len(pages) * shape.page_bytes
    speed = Speed([], [])
    # The first of each touches memory for the first time.
    for warm in [True] + [False] * repeats:
        for action, samples in ((encode, speed.encode), (decode, speed.decode)):
            sample = size_bytes / _cpu_s(action)
            if not warm:
                samples.append(sample)
    return speed, restored


def _cpu_s(action: Callable[[], None]) -> float:
    begun = time.thread_time()
    action()
    return time.thread_time() - begun


def _speed_rows(codec: Codec, speed: Speed, blocks: int) -> list[Row]:
    rows = []
    for direction, samples in (("encode", speed.encode), ("decode", speed.decode)):
        name, mb_s = f"{codec.name}_{direction}", [sample / 1e6 for sample in samples]
        detail = f"median of {len(mb_s)} over {blocks} blocks, {min(mb_s):.0f}..{max(mb_s):.0f}"
        target = TARGETS.get(codec.name)
        median = statistics.median(mb_s)
        if target is None:
            rows.append(shown(name, median, "MB/s", detail))
        else:
            rows.append(at_least(name, median, "MB/s", target, detail))
    return rows


def _snr_row(
    name: str,
    pages: list[bytearray],
    restored: list[bytearray],
    shape: PageShape,
    where: Region,
) -> Row:
    signal, noise = torch.zeros(shape.layers).double(), torch.zeros(shape.layers).double()
    for page, found in zip(pages, restored, strict=True):
        before = numbers(page, shape, where).double().flatten(1)
        after = numbers(found, shape, where).double().flatten(1)
        signal += before.square().sum(1)
        noise += (before - after).square().sum(1)
    worst = float((10 * torch.log10(signal / noise)).min())
    whole = 10 * math.log10(float(signal.sum() / noise.sum()))
    return shown(name, whole, "dB", f"worst layer {worst:.1f}")


def _crossovers(codec: Codec, ratio: float, speed: Speed, raw: Speed) -> list[Row]:
    """Encoding saves (1 - ratio) / B seconds a byte on a link of B, and costs 1 / speed, less what
    raw costs."""
    rows = []
    for name, own, raws in (
        ("fetch", speed.decode, raw.decode),
        ("store", speed.encode, raw.encode),
    ):
        extra_s = 1 / statistics.median(own) - 1 / statistics.median(raws)
        detail = f"with one core, below this link {codec.name} is faster than raw"
        row = f"{codec.name}_{name}_crossover"
        if extra_s > 0:
            rows.append(shown(row, (1 - ratio) / extra_s / 1e6, "MB/s", detail))
        else:
            rows.append(Row(row, None, "MB/s", None, True, f"{codec.name} is faster on any link"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the rows as a result")
    arguments = parser.parse_args()
    rows = measure(quick=os.environ.get("QUICK", "0") not in ("", "0"))
    for row in rows:
        print(row.line())
    if arguments.write:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        report = {"machine": machine(), "commit": commit(), "date": date}
        report["rows"] = [asdict(row) for row in rows]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "codecs.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
