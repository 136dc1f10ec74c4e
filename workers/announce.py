"""How replicas become known: a record each in the key-value store of Ray's GCS.

Serve places and restarts replicas; it does not tell an ingress their addresses. GCS does, without
a process of our own, and it survives with Ray's own fault tolerance. A record that its replica
does not renew is void: readers see `beat` stand still, so clocks need not agree.
"""

import asyncio
import contextlib
import logging

import msgspec
from ray.exceptions import RayError
from ray.experimental import internal_kv

from workers.messages import (
    DIRECTORY_NAMESPACE,
    RENEW_S,
    Announcement,
    Replica,
    directory_prefix,
)

logger = logging.getLogger(__name__)


async def keep_announced(cluster: str, replica: Replica) -> None:
    """Renew a replica's record until cancelled, then withdraw it."""
    # By epoch: two engines may carry one name while one of them is stopping.
    key = directory_prefix(cluster) + replica.epoch
    beat = 0
    try:
        while True:
            record = msgspec.json.encode(Announcement(replica, beat))
            try:
                await asyncio.to_thread(
                    internal_kv._internal_kv_put, key, record, True, namespace=DIRECTORY_NAMESPACE
                )
            except (RuntimeError, RayError) as error:  # GCS restarts: the next renewal finds it
                logger.warning("%s not announced: %s", replica.name, error)
            beat += 1
            await asyncio.sleep(RENEW_S)
    finally:
        with contextlib.suppress(RuntimeError, RayError):
            internal_kv._internal_kv_del(key, namespace=DIRECTORY_NAMESPACE)
