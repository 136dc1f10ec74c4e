"""One vault shard: its memory, its disk and its server, of one process."""

import time

import msgspec

from kv.errors import VaultError
from kv.eviction import Lru, Policy, ValueDensity
from kv.vault import wire
from kv.vault.orders import Quotas
from kv.vault.shard import Shard, Terms
from workers import connector, curve
from workers.vault.disk import Disk, DiskExtent, open_store
from workers.vault.region import Region
from workers.vault.server import ShardServer

POLICIES: dict[str, type[Policy]] = {"value": ValueDensity, "lru": Lru}


class ShardSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a shard is told: where it listens, who may speak to it, what it holds at most.

    `fingerprint` is of all that blocks' bytes depend on (`kv.fingerprint`). With a disk extent the
    quotas are of the disk, and memory holds what was used last. Times as in `kv.vault.shard.Terms`.
    """

    host: str
    keys: curve.ServerKeys
    fingerprint: str
    memory_bytes: int
    tenant_bytes: dict[str, int] = {}
    other_tenant_bytes: int | None = None
    disk: DiskExtent | None = None
    policy: str = "value"
    write_s: float = 30.0
    lease_s: float = 10.0
    most_lease_s: float = 120.0
    settle_s: float = 2.0


class ShardProcess:
    """Made on the event loop that will `serve`. Raises VaultError for settings that make no sense
    and for a folder that cannot be used."""

    def __init__(self, name: str, settings: ShardSettings) -> None:
        if settings.policy not in POLICIES:
            raise VaultError(f"vault policy {settings.policy}", "unknown", f"use {[*POLICIES]}")
        connector.keep_on_network(settings.host)
        self.restored_blocks = 0
        disk = settings.disk
        store = None if disk is None else open_store(disk, name, settings.fingerprint)
        self.quota_bytes = settings.memory_bytes if store is None else store.capacity_bytes
        quotas = Quotas(self.quota_bytes, settings.tenant_bytes, settings.other_tenant_bytes)
        terms = Terms(settings.write_s, settings.lease_s, settings.settle_s, settings.most_lease_s)
        self.region = Region(settings.memory_bytes, serves=True)
        policy = POLICIES[settings.policy]()
        shard = Shard(self.region.memory, quotas, policy, terms, extent=store is not None)
        self._disk = None
        if store is not None:
            self.restored_blocks = shard.restore(store.notes(), time.time(), time.monotonic())
            self._disk = Disk(store)
            self._disk.delete(shard.deleted())
        self._shard = shard
        self._server = ShardServer(
            settings.host,
            settings.keys,
            name,
            settings.fingerprint,
            self.region,
            shard,
            self._disk,
        )
        self.address = self._server.address

    def stats(self) -> wire.Stats:
        """What it holds now; on the event loop that serves."""
        return self._shard.stats(0)

    async def serve(self) -> None:
        """Until cancelled."""
        try:
            await self._server.serve()
        finally:
            if self._disk is not None:
                self._disk.close()
