"""What the tiers' benchmark makes of what it measures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tiers import page_cache, peers, peers_tierkv, restore, stores
from benchmarks.tiers.restore import LABELS, TURNS, check, rotated

BYTES = 2 * 32_768


def answered(**changes: Any) -> dict[str, Any]:
    """An answer behind two blocks of which nothing is told, but for `changes`."""
    nothing = {"device": 0, "prompt_tokens_host": 0, "prompt_tokens_disk": 0}
    nothing |= {"host_loaded_bytes": 0, "disk_loaded_bytes": 0, "disk_stored_bytes": 0}
    return nothing | {"computed": 5, "tokens": [1, 2]} | changes


RIGHT = {
    "cold": answered(computed=69, disk_stored_bytes=BYTES),
    "hit": answered(device=64),
    "host": answered(prompt_tokens_host=64, host_loaded_bytes=BYTES),
    "disk": answered(prompt_tokens_disk=64, host_loaded_bytes=BYTES, disk_loaded_bytes=BYTES),
}
KNOWN = {"bytes": BYTES, "tokens": [1, 2]}


@pytest.mark.parametrize("what", RIGHT)
def test_a_visit_counts_where_its_tokens_came_from(what: str) -> None:
    """Only as what it is: another kind's answer under the same name is refused."""
    check(what, RIGHT[what], 2, KNOWN, BYTES)
    for other, answer in RIGHT.items():
        if other != what:
            with pytest.raises(RuntimeError, match=what):
                check(what, answer, 2, KNOWN, BYTES)


@pytest.mark.parametrize("changes", [{"computed": 37}, {"tokens": [1, 3]}, {"device": 32}])
def test_a_partial_restore_is_none(changes: dict[str, Any]) -> None:
    """Part of it computed, part of it on the device, or another answer."""
    with pytest.raises(RuntimeError):
        check("host", RIGHT["host"] | changes, 2, KNOWN, 0)


def test_what_the_page_cache_gave_is_no_read_from_disk() -> None:
    """The tier may have loaded all of it, and the kernel read less from storage."""
    with pytest.raises(RuntimeError, match="read_bytes"):
        check("disk", RIGHT["disk"], 2, KNOWN, BYTES - 4096)


@given(st.lists(st.integers(), min_size=1), st.integers(0, 50))
def test_turns_keep_everyone(things: list[int], by: int) -> None:
    """Rotating loses nobody, and comes round."""
    assert sorted(rotated(things, by)) == sorted(things)
    assert rotated(things, len(things)) == things
    assert rotated(rotated(things, by), len(things) - by % len(things)) == things


def a_round(hit_s: float, **times_s: Sequence[float]) -> dict[str, Any]:
    """At 1,024 and 4,096 tokens the same; what is not given took as long as a hit."""
    visits = {
        what: [
            {"ttft_s": s, "read_bytes": 11, "loaded_bytes": 10} for s in times_s.get(what, [hit_s])
        ]
        for what in LABELS
    }
    prompts = {tokens: {"visits": visits} for tokens in ("1024", "4096")}
    return {"prompts": prompts, "pages_dropped": 7, "busy_cores": 0.25}


def test_ratios_are_of_rounds_and_meet_their_targets() -> None:
    """A slow round slows both sides of its ratio; 4,096 tokens have other targets than 1,024."""
    rounds = [
        a_round(scale, cold=[5 * scale], host=[1.2 * scale, 1.2 * scale], disk=[2.5 * scale])
        for scale in (1.0, 1.0, 3.0)
    ]
    found = {row.name: row for row in restore.rows(rounds)}
    host = found["from the host tier, against a device hit at 4096"]
    assert (host.value, host.target, host.ok) == (1.2, 1.3, True)
    disk = found["from disk, against a device hit at 4096"]
    assert (disk.value, disk.target, disk.ok) == (2.5, 2.0, False)
    assert found["from the host tier, against a device hit at 1024"].target is None
    for tokens, target in ((1024, 0.25), (4096, 0.1)):
        cold = found[f"from the host tier, against computed at {tokens}"]
        assert (cold.value, cold.target, cold.ok) == (0.24, target, target == 0.25)
    reads = found["read from storage, of what the disk tier loaded"]
    assert (reads.value, reads.ok) == (1.1, True)
    assert "14 pages" not in reads.detail
    assert "21 pages" in reads.detail


def test_every_kind_is_in_the_rows() -> None:
    """Cold, the three that take turns, and a fresh process."""
    names = [row.name for row in restore.rows([a_round(1.0)])]
    for what in (*TURNS, "cold", "fresh"):
        assert f"TTFT of 4096 tokens, {LABELS[what]}" in names


def test_gaps_count_while_all_streams_run() -> None:
    """Neither while one has not begun, nor when one has ended."""
    early, late = [0.0, 1.0, 2.0, 3.5], [1.0, 2.5, 4.0]
    assert stores.together([early, late]) == [1.0, 1.5, 1.5]


def a_turn(gap_s: float, stored: int) -> dict[str, Any]:
    at_s = [[gap_s + n * gap_s for n in range(5)]] * 2
    return {
        "at_s": at_s,
        "host_stored_bytes": stored,
        "disk_stored_bytes": stored,
        "prompt_tokens_computed": 100,
    }


def test_storing_is_compared_turn_by_turn() -> None:
    """One slow turn of both is no cost of storing."""
    on = [a_turn(0.5, 9), a_turn(1.0, 9), a_turn(4.0, 9)]
    off = [a_turn(0.5, 0), a_turn(1.0, 0), a_turn(2.0, 0)]
    p50 = stores.rows(on, off)[0]
    assert (p50.value, p50.target, p50.ok) == (1.0, 1.05, True)


@pytest.mark.parametrize(
    ("on", "off"),
    [
        (a_turn(1.0, 0), a_turn(1.0, 0)),
        (a_turn(1.0, 9), a_turn(1.0, 9)),
        (a_turn(1.0, 9) | {"disk_stored_bytes": 8}, a_turn(1.0, 0)),
        (a_turn(1.0, 9), a_turn(1.0, 0) | {"prompt_tokens_computed": 68}),
    ],
)
def test_a_turn_that_stored_nothing_proves_nothing(on: Any, off: Any) -> None:
    """Nor one whose blocks did not all reach the disk, nor one with part of a prompt cached."""
    with pytest.raises(RuntimeError):
        stores.rows([on], [off])


def test_dropped_files_are_out_of_memory(tmp_path: Path) -> None:
    """Or it is an error: on a file system in memory they stay."""
    path = tmp_path / "block"
    path.write_bytes(bytes(10 * 4096 + 1))
    try:
        assert page_cache.drop([path]) == 11
    except RuntimeError as error:
        pytest.skip(f"no disk below {tmp_path}: {error}")
    with path.open("rb") as file:
        assert page_cache.held(file.fileno()) == [False] * 11
        file.read(4096)
        assert page_cache.held(file.fileno())[0]


def test_a_peer_that_cannot_be_had_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and without a value; it misses no target of ours."""

    class Empty:
        def get(self, key: str, measure: Any) -> Any:
            raise peers_tierkv.Absent("no wheel for this machine")

    codec, *others = peers_tierkv.measured(Empty(), quick=True)  # type: ignore[arg-type]
    assert (codec.value, codec.ok) == (None, True)
    assert "no wheel for this machine" in codec.detail
    assert all(row.value is None and row.detail for row in others)


def test_the_fs_tier_is_compared_by_its_restores() -> None:
    """Ours against theirs, and a hit of each engine beside it."""
    found = {"ours": [a_round(1.0, disk=[3.0])], "fs": [a_round(1.0, disk=[2.0])]}
    rows = {row.name: row for row in peers.restore_rows(found)}
    assert rows["our disk tier against vLLM's fs tier at 4096"].value == 1.5


def test_noise_is_told_in_decibels() -> None:
    """An error of a tenth of each value is 20 dB down."""
    before = np.ones((2, 3), dtype=np.float32)
    assert peers_tierkv.snr_db(before, before * np.float32(1.1)) == pytest.approx(20.0, abs=0.01)
