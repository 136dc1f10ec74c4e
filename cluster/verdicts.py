"""The verdicts on codecs that this machine has measured, and whether a codec may be used.

One file in the cache folder, for all models: `kv.codecs.gate` has its form. It is replaced whole;
of two calibrations that end at once, the second reads what the first wrote.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.config import Config, cache_dir, engine_options
from cluster.errors import CodecRefusedError
from kv.codecs.codec import CodecName
from kv.codecs.frame import VERSION
from kv.codecs.gate import (
    Decision,
    GateLimits,
    Verdict,
    Verdicts,
    decide,
    dump_verdicts,
    gate_id,
    load_verdicts,
)
from kv.errors import CodecError
from workers import quality_prompts
from workers.tiers import model_identity

FILE = "codec-verdicts.json"
COMMAND = "breakeven calibrate --codecs"
LIMITS = GateLimits()
# `kv.codecs.table` knows too, and loads torch.
_LOSSLESS = frozenset({CodecName.RAW})


def read(cache: Path) -> Verdicts:
    """All verdicts; none where the file is not there. Raises `CodecError` for another file."""
    try:
        return load_verdicts((cache / FILE).read_bytes())
    except FileNotFoundError:
        return {}


def keep(cache: Path, model: str, found: Mapping[CodecName, Verdict | None]) -> None:
    """Put these verdicts of a model, by its fingerprint, in the place of older ones; None removes
    one: the codec does not take this model's pages any more."""
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        try:
            known = dict(read(cache))
        except CodecError:  # of another version: measured again as they are needed
            known = {}
        merged = {**known.get(model, {}), **{str(name): each for name, each in found.items()}}
        known[model] = {name: each for name, each in merged.items() if each is not None}
        draft = cache / f"{FILE}.{os.getpid()}"
        draft.write_bytes(dump_verdicts(known))
        draft.rename(cache / FILE)


def decision(
    verdicts: Verdicts, model: str, codec: CodecName, limits: GateLimits = LIMITS
) -> Decision:
    """Whether a model may use a codec, by what was measured of the prompts of this version."""
    verdict = verdicts.get(model, {}).get(codec)
    return decide(codec in _LOSSLESS, verdict, quality_prompts.digest(), VERSION, limits)


def check(cache: Path, model: str, codec: CodecName, limits: GateLimits = LIMITS) -> str:
    """The id of the gate that lets this model, by its fingerprint, use a codec
    (`kv.codecs.gate.gate_id`). Raises `CodecRefusedError` with the figures and what to run."""
    try:
        found = decision(read(cache), model, codec, limits)
    except CodecError as error:
        raise CodecRefusedError(codec, str(error), f"{COMMAND} {codec}") from error
    if not found.allowed:
        raise CodecRefusedError(codec, f"{found.reason}: {found.detail}", f"{COMMAND} {codec}")
    return gate_id(model, codec, VERSION, limits)


def gates(config: Config, model: Path | str) -> dict[CodecName, str]:
    """The lossy codec that a cluster is to use, if it is to use one, with its gate's id. Raises
    `CodecRefusedError` for one that this model may not use."""
    vault = config.tiers.vault
    if vault is None or vault.lossy is None:
        return {}
    identity = model_identity(str(model), engine_options(config, config.decode))
    return {vault.lossy: check(cache_dir(), identity, vault.lossy)}


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / f".{FILE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
