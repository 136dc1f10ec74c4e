"""What an ingress tells operators of the vault."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from router.vault import VaultView
from workers.directory import Shard, ShardRecord


def record(number: int, beat: int = 0, **bytes_by_codec: int) -> ShardRecord:
    shard = Shard(f"vault-{number}", f"e{number}", f"tcp://h:{number}", "127.0.0.1", 100 + number)
    return ShardRecord(shard, beat, 7, bytes_by_codec)


class Announced:
    """A directory; tests change the list. `down` makes it unreachable."""

    def __init__(self) -> None:
        self.records: Sequence[ShardRecord] = ()
        self.down = False

    async def shards(self) -> Sequence[ShardRecord]:
        if self.down:
            raise ConnectionError("GCS does not answer")
        return self.records


@pytest.fixture
def announced() -> Announced:
    return Announced()


async def _look(view: VaultView) -> None:
    watching = asyncio.create_task(view.watch())
    await asyncio.sleep(0.01)
    watching.cancel()


async def test_shards_are_listed_by_name(announced: Announced) -> None:
    """Each with its process and what it stores; a directory that is away changes nothing."""
    view = VaultView(announced)
    assert view.rows() == []
    announced.records = [record(1, raw=5), record(0, raw=4096)]
    await _look(view)
    assert [row["name"] for row in view.rows()] == ["vault-0", "vault-1"]
    assert view.rows()[0] == {
        "name": "vault-0",
        "pid": 100,
        "node": "127.0.0.1",
        "blocks": 7,
        "stored_bytes": 4096,
    }
    announced.down = True
    await _look(view)
    assert len(view.rows()) == 2


async def test_bytes_are_summed_by_codec(announced: Announced) -> None:
    """Over all shards; a cluster without a vault has no such metric."""
    view, registry = VaultView(announced), CollectorRegistry()
    registry.register(view)
    assert b"vault" not in generate_latest(registry)
    announced.records = [record(0, raw=4096), record(1, raw=1024)]
    await _look(view)
    assert b'breakeven_vault_bytes{codec="raw"} 5120.0' in generate_latest(registry)
