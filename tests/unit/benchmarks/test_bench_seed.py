"""What the seed experiments make of what they measure."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.breakeven import seed, seed_plot
from benchmarks.breakeven.seed import token_times_s
from benchmarks.breakeven.seed_rows import prefill_shares, prefixes, rows
from benchmarks.serve.load import Answer, Arrival

KEPT: dict[str, Any] = {
    "alone/256/0": {"tokens": 256, "ttft_s": 1.0, "latency_s": {"16": 2.0, "64": 4.0}},
    "alone/256/1": {"tokens": 256, "ttft_s": 1.0, "latency_s": {"16": 4.0, "64": 10.0}},
    "common/1/4": {
        "share": 1.0,
        "at_once": 4,
        "wall_s": 2.0,
        "prompt_tokens": 400,
        "cached_tokens": 300,
        "latency_s": [0.5, 0.5, 1.0, 1.0],
    },
    "common/0/4": {
        "share": 0.0,
        "at_once": 4,
        "wall_s": 8.0,
        "prompt_tokens": 400,
        "cached_tokens": 0,
        "latency_s": [4.0, 4.0, 4.0, 4.0],
    },
}


def test_prefills_share_is_until_the_first_token_of_all() -> None:
    """By input and output tokens, one of each repeat."""
    assert prefill_shares(KEPT) == {(256, 16): [0.5, 0.25], (256, 64): [0.25, 0.1]}


def test_a_bound_is_what_the_rest_takes_alone() -> None:
    """If prefill is 3/8 of the time, nothing makes it more than 1.6 times as quick."""
    [row] = [row for row in rows(KEPT) if row.name.endswith("16 out")]
    assert row.value == pytest.approx(0.375)
    assert "at most 1.6 times" in row.detail


def test_a_prefix_is_told_from_the_smallest_share() -> None:
    """Hit ratio, throughput and time of each; gains are against the smallest."""
    none, whole = prefixes(KEPT)[4]
    assert (none["hit_ratio"], none["per_s"], none["latency_s"]) == (0.0, 0.5, 4.0)
    assert (whole["hit_ratio"], whole["per_s"], whole["latency_s"]) == (0.75, 2.0, 0.75)
    [row] = [row for row in rows(KEPT) if row.name.startswith("100% common")]
    assert row.value == 0.75
    assert "4.00 times those of 0%" in row.detail


def test_tokens_that_come_together_are_several() -> None:
    """The time of the n-th token is asked for, not that of the n-th event."""
    events = [{"choices": [{"token_ids": ids, "text": "x"}]} for ids in ([1], [2, 3])]
    parts = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    usage = Arrival(4.0, b'data: {"choices": [], "usage": {}}\n\n')
    arrivals = [Arrival(2.0, parts[0]), Arrival(3.0, parts[1]), usage]
    assert token_times_s(Answer(1.0, 200, arrivals=arrivals)) == [2.0, 3.0, 3.0]


def test_repeats_come_last_to_first_in_turns() -> None:
    """What drifts does not look like a trend, and every cell is there once."""
    keys = list(seed._cells(seed.FULL))
    alone = [int(key.split("/")[1]) for key in keys if key.startswith("alone")]
    count = len(seed.FULL.inputs)
    assert alone[:count] == alone[count : 2 * count][::-1] == list(seed.FULL.inputs)
    common = len(seed.FULL.shares) * len(seed.FULL.concurrencies)
    assert len(keys) == count * seed.FULL.repeats + common


def test_restores_are_drawn_from_what_was_recorded(tmp_path: Path) -> None:
    """Both pictures are drawn, the recorded restores with the commit that they are of."""
    recorded = seed_plot._recorded()
    assert {told["commit"] for told in recorded.values()}
    seed_plot.draw(KEPT, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"seed.png", "seed-prefixes.png"}
