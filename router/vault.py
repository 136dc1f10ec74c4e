"""What an ingress knows of the vault: which shards there are and what they hold, for operators."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.targets import Target
from workers.directory import RENEW_S, ShardRecord

logger = logging.getLogger(__name__)


class ShardDirectory(Protocol):
    """Where shards announce themselves."""

    async def shards(self) -> Sequence[ShardRecord]:
        """Everyone announced now; raises OSError while the directory cannot be reached."""
        ...


class VaultView(Collector):
    """The shards as they last announced themselves, kept true while `watch` runs."""

    def __init__(self, directory: ShardDirectory) -> None:
        self._directory = directory
        self._shards: tuple[ShardRecord, ...] = ()

    async def watch(self) -> None:
        """Until cancelled: follow the directory."""
        while True:
            try:
                found = await self._directory.shards()
                self._shards = tuple(sorted(found, key=lambda record: record.shard.name))
            except OSError as error:  # what was known stays until it answers
                logger.warning("vault shards not looked up: %s", error)
            await asyncio.sleep(RENEW_S)

    @property
    def up(self) -> int:
        """How many shards renew their records."""
        return len(self._shards)

    def rows(self) -> list[dict[str, Any]]:
        """A row a shard, for `status`."""
        return [
            {
                "name": record.shard.name,
                "pid": record.shard.pid,
                "node": record.shard.node,
                "blocks": record.blocks,
                "stored_bytes": sum(record.stored_bytes.values()),
            }
            for record in self._shards
        ]

    def collect(self) -> Iterator[Metric]:
        """`breakeven_vault_bytes` by codec and what may be; nothing without a vault."""
        if not self._shards:
            return
        held = GaugeMetricFamily(
            "breakeven_vault_bytes", "Frames that the vault stores", labels=["codec"]
        )
        by_codec: dict[str, int] = {}
        for record in self._shards:
            for codec, n_bytes in record.stored_bytes.items():
                by_codec[codec] = by_codec.get(codec, 0) + n_bytes
        for codec, n_bytes in sorted(by_codec.items()):
            held.add_metric([codec], n_bytes)
        yield held
        quota_bytes = sum(record.shard.quota_bytes for record in self._shards)
        about = "Frames that the vault may store"
        yield GaugeMetricFamily("breakeven_vault_quota_bytes", about, quota_bytes)

    def targets(self) -> list[Target]:
        """Where shards answer Prometheus."""
        return [
            Target([record.shard.metrics_address], {"role": "vault", "replica": record.shard.name})
            for record in self._shards
            if record.shard.metrics_address
        ]
