"""How replicas become known: a record each in the key-value store of Ray's GCS.

Serve places and restarts replicas; it does not tell an ingress their addresses. GCS does, without
a process of our own, and it survives with Ray's own fault tolerance. A record that its replica
does not renew is void: readers see `beat` stand still, so clocks need not agree.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import msgspec
from ray.exceptions import RayError
from ray.experimental import internal_kv

from workers.directory import (
    DIRECTORY_NAMESPACE,
    RENEW_S,
    Announcement,
    ShardRecord,
    directory_prefix,
    shard_prefix,
)
from workers.messages import Replica

logger = logging.getLogger(__name__)


async def keep_announced(cluster: str, replica: Replica) -> None:
    """Renew a replica's record until cancelled, then withdraw it."""
    # By epoch: two engines may carry one name while one of them is stopping.
    key = directory_prefix(cluster) + replica.epoch
    await keep(key, lambda beat: Announcement(replica, beat))


async def watch_shards(cluster: str, seat: Callable[[Mapping[str, str]], None]) -> None:
    """Until cancelled, tell `seat` on this event loop where the vault's shards are: addresses by
    name. An address that is out of date only does not answer."""
    while True:
        try:
            seat(await asyncio.to_thread(_shards, shard_prefix(cluster)))
        except (RuntimeError, RayError) as error:  # GCS restarts: what was known goes on
            logger.warning("vault shards not looked up: %s", error)
        await asyncio.sleep(RENEW_S)


def _shards(prefix: str) -> dict[str, str]:
    found = {}
    for key in internal_kv._internal_kv_list(prefix, namespace=DIRECTORY_NAMESPACE):
        value = internal_kv._internal_kv_get(key, namespace=DIRECTORY_NAMESPACE)
        with contextlib.suppress(msgspec.MsgspecError):
            shard = msgspec.json.decode(value or b"", type=ShardRecord).shard
            found[shard.name] = shard.address
    return found


async def keep(key: str, record: Callable[[int], msgspec.Struct]) -> None:
    """Renew what `record` makes of a growing beat until cancelled, then withdraw it."""
    beat = 0
    try:
        while True:
            value = msgspec.json.encode(record(beat))
            try:
                await asyncio.to_thread(
                    internal_kv._internal_kv_put, key, value, True, namespace=DIRECTORY_NAMESPACE
                )
            except (RuntimeError, RayError) as error:  # GCS restarts: the next renewal finds it
                logger.warning("%s not announced: %s", key, error)
            beat += 1
            await asyncio.sleep(RENEW_S)
    finally:
        with contextlib.suppress(RuntimeError, RayError):
            internal_kv._internal_kv_del(key, namespace=DIRECTORY_NAMESPACE)
