"""A shard's disk extent: a segment store on a thread of its own, so that nobody waits for fsync.

Orders are carried out in the order in which they are given.
"""

import asyncio
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from kv.errors import SegmentError, SegmentFullError, VaultError
from kv.tiers.files import own
from kv.tiers.segments import SegmentStore
from kv.vault.note import tenant_of

logger = logging.getLogger(__name__)

_FINGERPRINT = re.compile(r"[0-9a-f]{24}")
_T = TypeVar("_T")


class DiskExtent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of one shard below `path`: `bytes` at most, at least three of `segment_bytes`."""

    path: str
    bytes: int
    segment_bytes: int = 64 << 20


def open_store(settings: DiskExtent, shard: str, fingerprint: str) -> SegmentStore:
    """The blocks of one shard that were stored under this fingerprint. Those under another one
    would count towards no budget, and are removed unless a process has them open.

    Raises SegmentError for a folder that cannot be used.
    """
    folder = Path(settings.path) / shard
    store = SegmentStore(folder / fingerprint, settings.bytes, settings.segment_bytes)
    for other in folder.iterdir():
        if other.name != fingerprint and _FINGERPRINT.fullmatch(other.name):
            _remove(other)
    return store


class Disk:
    """One store's thread."""

    def __init__(self, store: SegmentStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vault-disk")

    async def persist(self, blocks: Sequence[tuple[bytes, bytes, memoryview]]) -> frozenset[bytes]:
        """Write keys, notes and frames; the keys of those that are durable now."""
        return await self._run(lambda: self._persist(blocks))

    async def read(self, key: bytes) -> bytes | None:
        """A block's frame; None if it is not there, or no longer whole."""
        return await self._run(lambda: self._store.read(key))

    def delete(self, keys: Iterable[bytes]) -> None:
        """These blocks are gone, durably with what is persisted next."""
        self._thread.submit(self._store.delete, keys)

    async def erase(self, tags: frozenset[str]) -> bool:
        """Overwrite all blocks of these tenants; False where the disk fails."""
        return await self._run(lambda: self._erase(tags))

    def close(self) -> None:
        """Finish what was ordered, and close the files."""
        self._thread.submit(self._store.close)
        self._thread.shutdown()

    async def _run(self, job: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    def _persist(self, blocks: Sequence[tuple[bytes, bytes, memoryview]]) -> frozenset[bytes]:
        try:
            for key, note, frame in blocks:
                with suppress(SegmentFullError):
                    self._store.append(key, note, frame)
            return frozenset(self._store.commit())
        except SegmentError as error:
            logger.error("%d blocks not stored: %s", len(blocks), error)
            return frozenset()

    def _erase(self, tags: frozenset[str]) -> bool:
        try:
            notes = self._store.notes()
            self._store.erase([key for key, note, _ in notes if tenant_of(key, note) in tags])
        except VaultError as error:
            logger.error("not erased on disk: %s", error)
            return False
        return True


def _remove(folder: Path) -> None:
    # Held by another process: a shard of the same name that runs with another model.
    with suppress(SegmentError):
        held = own(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
