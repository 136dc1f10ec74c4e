"""The directory of replicas, read from the key-value store of Ray's GCS."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from ray.experimental import internal_kv

from workers.messages import (
    DIRECTORY_NAMESPACE,
    RENEW_S,
    Announcement,
    Replica,
    directory_prefix,
)

# A record that was not renewed for so long is that of a replica which is gone.
_VOID_S = 5 * RENEW_S


class GcsDirectory:
    """A `Directory` of one cluster; `now` is the reader's clock."""

    def __init__(self, cluster: str, now: Callable[[], float]) -> None:
        self._prefix, self._now = directory_prefix(cluster), now
        self._beats: dict[str, tuple[str, int, float]] = {}

    async def replicas(self) -> Sequence[Replica]:
        """Every replica whose record is being renewed."""
        try:
            records = await asyncio.to_thread(self._read)
        except RuntimeError as error:
            raise ConnectionError(f"GCS does not answer: {error}") from error
        return [record.replica for record in records if self._is_fresh(record)]

    def _read(self) -> list[Announcement]:
        keys = internal_kv._internal_kv_list(self._prefix, namespace=DIRECTORY_NAMESPACE)
        values = (internal_kv._internal_kv_get(key, namespace=DIRECTORY_NAMESPACE) for key in keys)
        return [msgspec.json.decode(value, type=Announcement) for value in values if value]

    def _is_fresh(self, record: Announcement) -> bool:
        name, seen = record.replica.name, (record.replica.epoch, record.beat)
        last = self._beats.get(name)
        if last is None or last[:2] != seen:
            self._beats[name] = (*seen, self._now())
            return True
        return self._now() - last[2] <= _VOID_S
