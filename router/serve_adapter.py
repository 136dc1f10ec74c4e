"""What ingresses share in the key-value store of Ray's GCS: the directory of replicas, catalogues,
vault shards and endpoints for Prometheus, and the operator's last order."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from ray.exceptions import RayError
from ray.experimental import internal_kv

from router.catalogue.wire import Seat, SeatRecord, seat_prefix
from router.orders import Order
from router.targets import Target, TargetRecord, target_prefix
from workers.directory import (
    DIRECTORY_NAMESPACE,
    RENEW_S,
    Announcement,
    ShardRecord,
    directory_prefix,
    shard_prefix,
)
from workers.messages import Replica

T = TypeVar("T", bound=msgspec.Struct)

# A record that was not renewed for so long is that of a replica which is gone.
_VOID_S = 5 * RENEW_S


class GcsDirectory:
    """The directory of one cluster; `now` is the reader's clock."""

    def __init__(self, cluster: str, now: Callable[[], float]) -> None:
        self._cluster, self._now = cluster, now
        self._beats: dict[str, tuple[int, float]] = {}

    async def replicas(self) -> Sequence[Replica]:
        """Every replica whose record is being renewed."""
        records = await self._records(directory_prefix(self._cluster), Announcement)
        return [r.replica for r in records if self._is_fresh(r.replica.epoch, r.beat)]

    async def catalogues(self) -> Sequence[Seat]:
        """Every catalogue whose record is being renewed."""
        records = await self._records(seat_prefix(self._cluster), SeatRecord)
        return [r.seat for r in records if self._is_fresh(r.seat.epoch, r.beat)]

    async def shards(self) -> Sequence[ShardRecord]:
        """Every shard of the vault whose record is being renewed."""
        records = await self._records(shard_prefix(self._cluster), ShardRecord)
        return [r for r in records if self._is_fresh(r.shard.epoch, r.beat)]

    async def targets(self) -> Sequence[Target]:
        """Where ingresses and catalogues answer Prometheus, of those that renew their records."""
        records = await self._records(target_prefix(self._cluster), TargetRecord)
        return [r.target for r in records if self._is_fresh(r.epoch, r.beat)]

    async def _records(self, prefix: str, kind: type[T]) -> list[T]:
        values = await _answered(_read, prefix)
        return [record for value in values if (record := _decoded(value, kind)) is not None]

    def _is_fresh(self, epoch: str, beat: int) -> bool:
        last = self._beats.get(epoch)
        if last is None or last[0] != beat:
            self._beats[epoch] = (beat, self._now())
            return True
        return self._now() - last[1] <= _VOID_S


def _read(prefix: str) -> list[bytes]:
    keys = internal_kv._internal_kv_list(prefix, namespace=DIRECTORY_NAMESPACE)
    get = internal_kv._internal_kv_get
    values = (get(key, namespace=DIRECTORY_NAMESPACE) for key in keys)
    return [value for value in values if value]


class GcsOrders:
    """The `Orders` of one run of a cluster, which `secret` is peculiar to: on a Ray cluster that
    outlives it the next run begins without orders."""

    def __init__(self, cluster: str, secret: bytes) -> None:
        self._key = f"orders/{cluster}/{hashlib.sha256(b'orders' + secret).hexdigest()}"

    async def read(self) -> Order | None:
        """The order that was given last, if one was; None too for that of another version."""
        get = internal_kv._internal_kv_get
        value = await _answered(get, self._key, namespace=DIRECTORY_NAMESPACE)
        try:
            return msgspec.json.decode(value, type=Order) if value else None
        except msgspec.MsgspecError:
            return None

    async def write(self, order: Order) -> None:
        """Put `order` in the place of the one before."""
        put, value = internal_kv._internal_kv_put, msgspec.json.encode(order)
        await _answered(put, self._key, value, True, namespace=DIRECTORY_NAMESPACE)


async def _answered(call: Callable[..., Any], *args: object, **named: object) -> Any:
    """What GCS answers; raises ConnectionError when it does not."""
    try:
        return await asyncio.to_thread(call, *args, **named)
    except (RuntimeError, RayError) as error:
        raise ConnectionError(f"GCS does not answer: {error}") from error


def _decoded(value: bytes, kind: type[T]) -> T | None:
    """A record, or None for that of another version: it is not routable from here."""
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError:
        return None
