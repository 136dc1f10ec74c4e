"""The directory of replicas, read from the key-value store of Ray's GCS."""

import asyncio
from collections.abc import Callable, Sequence

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

# A record that was not renewed for so long is that of a replica which is gone.
_VOID_S = 5 * RENEW_S


class GcsDirectory:
    """A `Directory` of one cluster; `now` is the reader's clock."""

    def __init__(self, cluster: str, now: Callable[[], float]) -> None:
        self._prefix, self._now = directory_prefix(cluster), now
        self._beats: dict[str, tuple[int, float]] = {}

    async def replicas(self) -> Sequence[Replica]:
        """Every replica whose record is being renewed."""
        try:
            values = await asyncio.to_thread(self._read)
        except (RuntimeError, RayError) as error:
            raise ConnectionError(f"GCS does not answer: {error}") from error
        records = [record for value in values if (record := _decoded(value)) is not None]
        return [record.replica for record in records if self._is_fresh(record)]

    def _read(self) -> list[bytes]:
        keys = internal_kv._internal_kv_list(self._prefix, namespace=DIRECTORY_NAMESPACE)
        get = internal_kv._internal_kv_get
        values = (get(key, namespace=DIRECTORY_NAMESPACE) for key in keys)
        return [value for value in values if value]

    def _is_fresh(self, record: Announcement) -> bool:
        epoch, beat = record.replica.epoch, record.beat
        last = self._beats.get(epoch)
        if last is None or last[0] != beat:
            self._beats[epoch] = (beat, self._now())
            return True
        return self._now() - last[1] <= _VOID_S


def _decoded(value: bytes) -> Announcement | None:
    """A record, or None for that of another version: it is not routable from here."""
    try:
        return msgspec.json.decode(value, type=Announcement)
    except msgspec.MsgspecError:
        return None
