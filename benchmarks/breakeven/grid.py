"""Time to the first token of a prompt whose prefix lies in a vault, by link, codec and policy.

The vault is on one Ray node, the engines are on the other, with a shaped link between them
(`benchmarks.breakeven.far_vault`); `shared memory` has both on one node. The policies take turns
within a cell, and cells of a link come in a shuffled order. A threshold's times are those of the
policy that it names for a cell, with the threshold that is best for the cell's link and codec on
this very grid: nobody could tune it better.

Who loses a cell's first round clearly is measured once there. Each sample is checked: fetching took
the whole prefix from the vault, and computing nothing of it.

All links take hours, and every ratio is of one cell. So a link that was measured whole stays, at
whichever commit, until its file is removed, and the rows say of which commits they are.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.breakeven.cells import COMPUTE, OURS, POLICIES, Cell, rows
from benchmarks.breakeven.far_vault import FarVault, Room, Sample, Way, by_cluster, far_vault
from benchmarks.result import Row, Store, raw_folder, shown

_TRIES = 3
# A policy that took so many times as long as the best of a cell's first round is not measured
# again there.
CLEAR = 2.5


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured, and how often."""

    ways: tuple[Way, ...]
    prefixes: tuple[int, ...]
    suffixes: tuple[int, ...]
    rounds: int
    room: Room


_SHARED = Way("shared memory", together=True)
_SLOWER = (Way("1 Gbit/s", 1e9), Way("200 Mbit/s", 2e8), Way("50 Mbit/s", 5e7))
_LATER = Way("1 Gbit/s, +20 ms", 1e9, 0.01)
FULL = Size(
    (_SHARED, _LATER, *_SLOWER),
    (256, 512, 1024, 2048, 4096, 6144),
    (32, 512),
    3,
    Room(6144, ("raw", "int8")),
)
QUICK = Size((_SLOWER[2],), (256, 1024), (32,), 1, Room(1024, ("raw",), 1 << 27, 1 << 27))


def measure(quick: bool) -> list[Row]:
    """Rows of this part; links that were measured whole, and cells that were at this commit, are
    not measured again."""
    size = QUICK if quick else FULL
    for alike in by_cluster([way for way in size.ways if not _whole(size, way, quick)]):
        stores = {way: Store(_named(way), quick) for way in alike}
        wanted = {w: [key for key in _keys(size, w) if key not in stores[w]] for w in alike}
        if any(wanted.values()):
            with far_vault(alike[0], size.room, quick) as vault:
                for way, keys in wanted.items():
                    _take(vault, size, way, keys, stores[way])
    return measured(quick)


def measured(quick: bool) -> list[Row]:
    """Rows of the links that were measured whole."""
    size = QUICK if quick else FULL
    whole = {way: found for way in size.ways if (found := _whole(size, way, quick))}
    told = ", ".join(f"{way.name} at {kept['commit']}" for way, kept in whole.items())
    return [shown("links", len(whole), f"of {len(size.ways)}", told), *rows(cells(quick))]


def cells(quick: bool) -> list[Cell]:
    """Those of the links that were measured whole."""
    size = QUICK if quick else FULL
    kept = [found for way in size.ways if (found := _whole(size, way, quick))]
    return [cell_of(told) for found in kept for told in found["results"].values()]


def _whole(size: Size, way: Way, quick: bool) -> dict[str, Any] | None:
    """What was kept of a link, if that is all of its cells."""
    path = raw_folder(Path(__file__).parent / "results", quick) / f"{Path(_named(way)).stem}.json"
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept if all(key in kept["results"] for key in _keys(size, way)) else None


def _named(way: Way) -> str:
    """As the module of a part of its own, for `Store`."""
    slug = re.sub(r"[^a-z0-9]+", "-", way.name.lower()).strip("-")
    return str(Path(__file__).with_name(f"grid-{slug}.py"))


def cell_of(told: dict[str, Any]) -> Cell:
    """A cell from what is kept of it."""
    samples = told["samples"]
    pairs = [(each["predicted_s"], each["ingress_ttft_s"]) for each in samples[OURS]]
    ttft_s = {policy: [each["ttft_s"] for each in samples[policy]] for policy in POLICIES}
    shape = (told["link"], told["codec"], told["prefix_tokens"], told["suffix_tokens"])
    return Cell(*shape, ttft_s, pairs)


def _take(vault: FarVault, size: Size, way: Way, keys: Sequence[str], store: Store) -> None:
    """Measure these cells over this way."""
    if not keys:
        return
    for codec in size.room.codecs:
        vault.store(codec)
    vault.limit(way.bits_per_s)
    vault.learn(size.room.codecs)
    for number, key in enumerate(keys):
        _, codec, prefix, suffix = key.split("/")
        cell = partial(_cell, vault, size.rounds, way, codec, int(prefix), int(suffix))
        found = cell_of(store.get(key, cell))
        shown = ", ".join(f"{policy} {found.median_s(policy):.2f} s" for policy in POLICIES)
        print(f"    {number + 1} of {len(keys)}: {key}: {shown}", flush=True)


def _cell(
    vault: FarVault, rounds: int, way: Way, codec: str, prefix: int, suffix: int
) -> dict[str, Any]:
    samples: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for turn in range(rounds):
        first = turn % len(POLICIES)
        for policy in (*POLICIES[first:], *POLICIES[:first]):
            if policy == OURS or not _lost(samples, policy):
                samples[policy].append(asdict(_sample(vault, way, policy, codec, prefix, suffix)))
    shape = {"prefix_tokens": prefix, "suffix_tokens": suffix}
    return {"link": way.name, "codec": codec, **shape, "samples": samples}


def _lost(samples: dict[str, list[dict[str, Any]]], policy: str) -> bool:
    """Whether the first round was clear: nothing depends on how exactly such a policy loses."""
    firsts = {each: found[0]["ttft_s"] for each, found in samples.items() if found}
    return policy in firsts and firsts[policy] > CLEAR * min(firsts.values())


def _sample(vault: FarVault, way: Way, policy: str, codec: str, prefix: int, suffix: int) -> Sample:
    for _ in range(_TRIES):
        sample = vault.ask(policy, codec, prefix, suffix)
        whole = sample.fetched_tokens == (0 if policy == COMPUTE else prefix)
        if whole or policy == OURS:
            return sample
        # The vault gave it up, or it did not come: once more, with it there.
        vault.store(codec)
        vault.limit(way.bits_per_s)
    raise RuntimeError(f"{policy} fetched {sample.fetched_tokens} of {prefix} tokens: {sample}")


def _keys(size: Size, way: Way) -> list[str]:
    """Its cells, shuffled, so that nothing that drifts looks like a trend."""
    keys = [
        f"{way.name.replace('/', ' per ')}/{codec}/{prefix}/{suffix}"
        for codec in size.room.codecs
        for prefix in size.prefixes
        for suffix in size.suffixes
    ]
    random.Random(1).shuffle(keys)
    return keys
