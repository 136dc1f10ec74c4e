"""A cluster whose vault is on another node than its engines, behind a shaped link.

Before each request the engines drop all that they cache, and what they store from the last one has
crossed the link: the vault is the only place to fetch from. Prompts are token ids, and one token is
asked for. There is one request at a time, so no streams are taken to run beside it, and what became
slow is not tried again unless that is what is measured.
"""

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.breakeven.cells import FETCH, OURS
from benchmarks.links.cluster import LinkedCluster, linked
from benchmarks.links.network import Shape
from benchmarks.models import model
from benchmarks.result import ROOT
from cluster.config import cache_dir
from cluster.verdicts import FILE as VERDICTS

ENGINES, BLOCK_TOKENS = ("decode-0", "prefill-0"), 32
RAW = "raw"
# Fetches after a link has changed, so that curves know it before anything is measured.
_LEARNING, _LEARNING_TOKENS = 4, 1024
_STORED_S = 120.0
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Way:
    """A way between vault and engine; `together` has both on one node."""

    name: str
    bits_per_s: float | None = None
    delay_s: float = 0.0
    together: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """The longest prefix that the vault is to hold, in which codecs, and the memory for it."""

    prefix_tokens: int
    codecs: tuple[str, ...] = (RAW,)
    host_bytes: int = GIB
    vault_bytes: int = 2 * GIB


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds to its answer here, and to its first token at the ingress; the plan's
    prediction of the latter; and where the decode replica had the prompt's tokens from."""

    ttft_s: float
    ingress_ttft_s: float
    predicted_s: float
    plan: str
    sources: dict[str, int]

    @property
    def fetched_tokens(self) -> int:
        return self.sources.get("vault", 0)


class FarVault:
    """See the module."""

    def __init__(self, cluster: LinkedCluster, room: Room, seed: int = 5) -> None:
        self._cluster, self._random = cluster, random.Random(seed)
        self._prefix = self._tokens(room.prefix_tokens)

    def ask(self, policy: str, codec: str, prefix_tokens: int, suffix_tokens: int) -> Sample:
        """One request by this policy, for so much of the prefix and a suffix that nobody has
        seen."""
        cluster = self._cluster
        cluster.post("/admin/policy", {"policy": policy})
        cluster.settle(*ENGINES)
        prompt = self._prefix[:prefix_tokens] + self._tokens(suffix_tokens)
        seconds = self._complete(prompt, codec)
        *_, decision = cluster.get("/admin/decisions")["decisions"]
        return Sample(
            seconds,
            decision["ttft_s"],
            decision["predicted_ttft_s"],
            decision["plan"],
            decision["sources"]["decode"],
        )

    def store(self, codec: str) -> None:
        """Have the vault hold the whole prefix, sent over a link without a limit; the limit is gone
        afterwards. Raises RuntimeError where the vault does not take it."""
        self.limit(None)
        deadline_s = time.monotonic() + _STORED_S
        whole = len(self._prefix) // BLOCK_TOKENS * BLOCK_TOKENS
        while (
            found := self.ask(FETCH, codec, len(self._prefix), BLOCK_TOKENS)
        ).fetched_tokens != whole:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the vault does not take the prefix: {found}")
            self._cluster.await_quiet()

    def learn(self, codecs: Sequence[str] = (RAW,)) -> None:
        """Fetch a few times, so that what is planned knows the link as it is now; and ask for a
        plan of ours, so that engines have met before anything is measured."""
        tokens = min(len(self._prefix), _LEARNING_TOKENS)
        for codec in codecs:
            for policy in (*_LEARNING * (FETCH,), OURS):
                self.ask(policy, codec, tokens, BLOCK_TOKENS)

    def limit(self, bits_per_s: float | None) -> None:
        """Another rate of the link, where there is one."""
        if not self._cluster.together:
            self._cluster.link.limit(bits_per_s)

    def _complete(self, prompt: list[int], codec: str) -> float:
        headers = {} if codec == RAW else {"x-breakeven-codec": codec}
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        began_s = time.perf_counter()
        self._cluster.post("/v1/completions", body, headers)
        return time.perf_counter() - began_s

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1000, 40_000) for _ in range(count)]


@contextlib.contextmanager
def far_vault(
    way: Way, room: Room, quick: bool, retry_s: float | None = None
) -> Iterator[FarVault]:
    """A cluster of this way's delay, whose vault holds nothing yet; its rate is set by `limit`.
    `retry_s` is the router's."""
    sections = {**_sections(room), "router": {"assumed_streams": 0, "retry_s": retry_s}}
    cache = _verdicts(sections) if len(room.codecs) > 1 else {}
    shape = Shape(None, way.delay_s)
    with linked(shape, sections, model(quick), cache, way.together) as cluster:
        yield FarVault(cluster, room)


def by_cluster(ways: Sequence[Way]) -> list[tuple[Way, ...]]:
    """Ways that one cluster can take: they differ by their rate alone."""
    kinds: dict[tuple[float, bool], list[Way]] = {}
    for way in ways:
        kinds.setdefault((way.delay_s, way.together), []).append(way)
    return [tuple(alike) for alike in kinds.values()]


def _sections(room: Room) -> dict[str, Any]:
    lossy = [codec for codec in room.codecs if codec != RAW]
    return {
        "prefill": {"replicas": 1, "resources": {"near": 1}, "surge": False},
        "decode": {"replicas": 1, "resources": {"near": 1}, "surge": False},
        # A plan that is tried would be measured as one that was found cheapest.
        "router": {"explore": 0},
        "tiers": {
            "host": {"bytes": room.host_bytes},
            "peer": {},
            "vault": {
                "shards": 1,
                "memory_bytes": room.vault_bytes,
                "resources": {"far": 1},
                "lossy": lossy[0] if lossy else None,
            },
        },
    }


def _verdicts(sections: dict[str, Any]) -> dict[str, Path]:
    """The verdicts on codecs, which `serve` asks for; measured first where there are none."""
    path = cache_dir() / VERDICTS
    if not path.exists():
        codec = sections["tiers"]["vault"]["lossy"]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
            yaml.safe_dump({**sections, "model": str(model())}, config)
            config.flush()
            words = [sys.executable, "-m", "cluster", "calibrate", "--codecs", codec]
            subprocess.run([*words, "--config", config.name], cwd=ROOT, check=True)
    return {VERDICTS: path}
