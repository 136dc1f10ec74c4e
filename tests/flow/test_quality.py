"""Codecs are judged on a real engine, by its answers."""

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster import verdicts
from cluster.errors import CodecRefusedError
from kv.codecs.codec import CodecName

ROOT = Path(__file__).resolve().parents[2]


def calibrate(cache: Path, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    env = {**os.environ, "BREAKEVEN_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cluster", "calibrate", "--json", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, report["codecs"], report["model"]


def test_a_codecs_harm_is_measured_and_kept(tiny_model: Path, tmp_path: Path) -> None:
    """The finer a codec, the less it moves logprobs; each is let through or refused by what was
    measured."""
    _, rows, model = calibrate(tmp_path, "--model", str(tiny_model), "--codecs")
    found = {row["codec"]: row for row in rows}
    assert set(found) == {"fp16", "bf16", "int8", "tq4"}
    deltas = [found[name]["max_logprob_delta"] for name in ("fp16", "int8", "tq4")]
    assert 0 < deltas[0] < deltas[1]
    agreed = [found[name]["agreed_tokens"] for name in ("fp16", "bf16", "int8", "tq4")]
    assert agreed[0] >= agreed[1] >= agreed[3]
    assert agreed[0] >= agreed[2] >= agreed[3]
    assert all(row["tokens"] == 288 for row in rows)
    for name, row in found.items():
        refused = pytest.raises(CodecRefusedError, match=name)
        outcome: AbstractContextManager[Any] = nullcontext() if row["allowed"] else refused
        with outcome:
            verdicts.check(tmp_path, model, CodecName(name))
    assert found["fp16"]["allowed"]
    assert not found["tq4"]["allowed"]
