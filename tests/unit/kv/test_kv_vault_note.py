"""The books of a shard come back from its disk."""

from math import inf
from pathlib import Path

import pytest

from kv.errors import VaultError
from kv.eviction import ValueDensity
from kv.tiers.segments import SegmentStore
from kv.vault.ledger import Ledger
from kv.vault.note import packed, unpacked
from kv.vault.orders import Outcome, Put, Quotas


def test_a_restarted_shard_has_the_same_books(tmp_path: Path) -> None:
    """Tenants, tree, costs and the rest of each life are as they were; what expired while nobody
    ran is not served."""
    puts = [
        Put(b"a0", None, "a", "w", 10, 1.0),
        Put(b"a1", b"a0", "a", "w", 11, 2.0, ttl_s=100.0),
        Put(b"b0", None, "b", "w", 12, 3.0, ttl_s=20.0),
    ]
    store = SegmentStore(tmp_path / "vault", 30_000, 10_000)
    for put in puts:
        store.append(put.key, packed(put, wall_s=1_000.0), bytes(put.n_bytes))
    store.commit()
    store.close()

    store = SegmentStore(tmp_path / "vault", 30_000, 10_000)
    ledger = Ledger(Quotas(100), ValueDensity())
    for key, note, n_bytes in store.notes():
        put = unpacked(key, note, n_bytes, "restart", wall_s=1_030.0)
        if put is not None:
            assert ledger.begin(put, 5.0).outcome is Outcome.WRITE
            assert ledger.complete(key, "restart", 5.0)
    store.close()
    ledger.check_integrity()
    assert (ledger.tenant_bytes("a"), ledger.tenant_bytes("b")) == (21, 0)
    assert ledger.depth([b"a0", b"a1"], 5.0) == 2
    assert [each.key for each in ledger.advance(5.0 + 70.0)] == [b"a1"]
    assert ledger._entries[b"a0"].expires_s == inf


@pytest.mark.parametrize("note", [b"", b"note", b"\x94\xa1a\xc0\xa1x\xc0", b"\x91\xa1a"])
def test_a_note_of_something_else_is_an_error(note: bytes) -> None:
    """It is the block's, and says what to do about it."""
    with pytest.raises(VaultError, match="drop the block"):
        unpacked(b"key", note, 1, "restart", 0.0)
