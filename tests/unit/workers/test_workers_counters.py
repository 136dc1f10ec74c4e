"""What vLLM's connectors tell of a step, and what is made of it."""

from types import SimpleNamespace
from typing import Any

from kv.catalogue import Tier
from workers.counters import FAILED, PROMOTED, Counters
from workers.tiers import TIERED_CONNECTOR

PEER, DISK, VAULT = ("1:PeerTier",), ("0:DiskTier",), ("2:VaultTier",)
N_BYTES = 16 * 2**20


def step(counters: Counters, promoted: dict[tuple[str, ...], float], failed: int = 0) -> None:
    """One in which so many bytes came from each of these tiers in so many seconds."""
    stats: Any = SimpleNamespace(kv_connector_stats={})
    if promoted:
        n_bytes, seconds = PROMOTED
        data = {n_bytes: dict.fromkeys(promoted, N_BYTES), seconds: promoted}
        data |= {FAILED: dict.fromkeys(promoted, failed)} if failed else {}
        stats.kv_connector_stats = {TIERED_CONNECTOR: {"data": data}}
    counters.observe(stats)


def made() -> Counters:
    counters = Counters((Tier.HOST, Tier.DISK, Tier.VAULT), lambda: 100.0)
    for _ in range(2):
        step(counters, {})
    return counters


def test_what_comes_from_a_peer_moves_its_curve() -> None:
    """And only that; its bytes are counted."""
    counters = made()
    for _ in range(5):
        step(counters, {PEER: 0.9})
    told = counters.fetches.peer()
    assert told is not None
    assert told.samples >= 3
    assert 0.7 < told.latency_s + told.per_byte_s * N_BYTES < 1.1
    assert counters.fetches.load(Tier.DISK, 0, 0).samples == 0
    assert counters.frozen().peer_loaded_bytes == 5 * N_BYTES


def test_a_load_that_was_cut_short_says_nothing_of_a_peer_s_link() -> None:
    """It took as long as it was let, for a part of its bytes."""
    counters = made()
    for _ in range(5):
        step(counters, {PEER: 5.0}, failed=1)
    assert counters.fetches.peer() is None
    assert counters.frozen().failed_loads == 5


def test_a_disk_s_copies_are_told_and_a_vault_tells_its_own() -> None:
    """Which of them were of smaller frames only the vault knows."""
    counters = made()
    for _ in range(5):
        step(counters, {DISK: 5.0, VAULT: 5.0})
    assert counters.fetches.load(Tier.DISK, 0, 0).samples >= 3
    assert counters.fetches.load(Tier.VAULT, 0, 0).samples == 0
