"""The conversation trace as requests to simulated replicas.

A row has lengths in tokens, and a number for each 512 tokens of its prompt; equal numbers are equal
tokens behind equal ones. Here `SCALE` tokens of the trace are one: a block of 512 is one of 16, and
what a token takes to compute, to move and to hold is `SCALE` times that of a real one, so that
seconds are those of the trace. Answers, of which nothing here depends on but how long streams run,
are shortened by as much.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks.tiers.eviction import BLOCK_TOKENS as TRACE_BLOCK_TOKENS
from benchmarks.tiers.eviction import GPU_8B, find_trace
from kv.block import TOKEN_BYTES, chain, root_key
from kv.curve import LinkCurve, PrefillCurve
from router.request import Request
from tests.sim.world import request
from workers.sim import SimCosts

BLOCK_TOKENS = 16
SCALE = TRACE_BLOCK_TOKENS // BLOCK_TOKENS
# Llama-3.1-8B in bf16, as the curve.
KV_BYTES_PER_TOKEN = SCALE * 131_072


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and the second at which it comes."""

    at_s: float
    request: Request


def arrivals(count: int, times_faster: float, most_blocks: int) -> list[Arrival]:
    """The first `count` rows of the trace but those with more blocks, so many times as dense."""
    with gzip.open(find_trace(), "rt") as lines:
        rows = map(json.loads, lines)
        short = (row for row in rows if len(row["hash_ids"]) <= most_blocks)
        return [
            Arrival(row["timestamp"] / 1000.0 / times_faster, _request(f"r{number}", row))
            for number, row in enumerate(islice(short, count))
        ]


def costs(host_blocks: int, **more: Any) -> SimCosts:
    """Of an 8B model on one GPU; 10 GB/s between replicas, 20 GB/s to a host tier; `more` of what
    else a `SimCosts` says."""
    prefill = PrefillCurve(0.01, GPU_8B.per_token_s * SCALE, GPU_8B.per_token2_s * SCALE * SCALE)
    link, host = LinkCurve(0.005, 1e-10), LinkCurve(0.002, 5e-11)
    return SimCosts(prefill=prefill, link=link, host=host, host_blocks=host_blocks, **more)


def endless_hits(came: Sequence[Arrival]) -> float:
    """The share of prompt tokens that one cache of all requests, without an end, would have."""
    seen: set[bytes] = set()
    cached = total = 0
    for each in came:
        keys = chain(root_key(None), each.request.tokens[:-TOKEN_BYTES], BLOCK_TOKENS)
        found = next((at for at, key in enumerate(keys) if key not in seen), len(keys))
        cached += BLOCK_TOKENS * found
        total += each.request.prompt_tokens
        seen.update(keys)
    return cached / total


def _request(name: str, row: dict[str, Any]) -> Request:
    tokens = [number for number in row["hash_ids"] for _ in range(BLOCK_TOKENS)]
    length, answered = (max(1, row[at] // SCALE) for at in ("input_length", "output_length"))
    return request(name, tokens[:length], answered)
