"""What vLLM's connectors tell of a step, and what is made of it."""

from types import SimpleNamespace
from typing import Any

import pytest

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


def test_a_disk_s_copies_are_told_and_a_vault_and_peers_tell_their_own() -> None:
    """vLLM tells sums over what ended in a step, which of a vault and peers make no curve; they
    are counted."""
    counters = Counters((Tier.HOST, Tier.DISK, Tier.VAULT), lambda: 100.0)
    for _ in range(5):
        step(counters, {DISK: 5.0, VAULT: 5.0, PEER: 5.0}, failed=1)
    assert counters.fetches.load(Tier.DISK, 0, 0).samples >= 3
    assert counters.fetches.load(Tier.VAULT, 0, 0).samples == 0
    assert counters.fetches.peer() is None
    assert counters.frozen().peer_loaded_bytes == 5 * N_BYTES
    assert counters.frozen().failed_loads == 15


@pytest.mark.parametrize(("told", "counted"), [([1, 1, 1, 1], 1), ([1], 1), ([2, 2, 1, 2], 2)])
def test_what_all_ranks_of_an_engine_tell_counts_once(told: list[int], counted: int) -> None:
    """Each has its part of a read, or of a lease, and the same end of it."""
    counters = Counters((), lambda: 100.0, ranks=4)
    seen = {"num_failed_transfers": told, "num_kv_expired_reqs": told, "bytes_transferred": [9] * 4}
    counters.observe(SimpleNamespace(kv_connector_stats=seen))  # type: ignore[arg-type]
    totals = counters.frozen()
    assert (totals.failed_transfers, totals.expired_leases) == (counted, counted)
    assert totals.transfer_bytes == 36
