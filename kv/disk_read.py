"""Reads of whole files, past the page cache unless that has them.

Through the cache a read is copied once more and the cache's pages are made for it, which on fast
storage takes longer than the storage does. So a file is read straight into place (O_DIRECT), but
one that the cache has already, or that was not written back yet, is copied out of it. Where the
file system refuses O_DIRECT everything goes through the cache.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

# What O_DIRECT wants addresses, offsets and lengths to be multiples of: the largest sector.
UNIT_BYTES = 4096
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_DIRECT = getattr(os, "O_DIRECT", 0)
_CACHESTAT = 451  # since Linux 6.5, on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def is_aligned(memory: memoryview) -> bool:
    """Whether memory that can be written to begins and ends with a unit."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return address % UNIT_BYTES == 0 and len(memory) % UNIT_BYTES == 0


class Reader:
    """Any thread may use one."""

    def __init__(self) -> None:
        self.direct = bool(_DIRECT)  # until the file system refuses it
        self._own = threading.local()

    def scratch(self, n_bytes: int) -> memoryview:
        """Aligned memory of this thread's for a file of so many bytes: whole units, with room for
        at least one byte more. The next call hands out the same."""
        wanted = (n_bytes // UNIT_BYTES + 1) * UNIT_BYTES
        held: memoryview | None = getattr(self._own, "memory", None)
        if held is None or len(held) < wanted:
            held = self._own.memory = memoryview(mmap.mmap(-1, wanted))
        return held[:wanted]

    def read(self, path: Path, room: Sequence[memoryview], n_bytes: int) -> bool:
        """Read a file into `room`, which is of whole units and aligned, and larger than `n_bytes`;
        False if the file is not exactly that long. Raises `OSError` if it cannot be read."""
        file, direct = self._open(path, n_bytes)
        try:
            got = 0
            while got < n_bytes:
                try:
                    count = os.preadv(file, list(_from(room, got)), got)
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    direct = self.direct = self._through_cache(file)
                    continue
                got += count
                if count == 0:
                    break
                if direct and got % UNIT_BYTES and got < n_bytes:
                    direct = self._through_cache(file)  # from within a unit on
        finally:
            os.close(file)
        return got == n_bytes

    def _open(self, path: Path, n_bytes: int) -> tuple[int, bool]:
        """The file, and whether it is read past the cache."""
        if self.direct:
            try:
                file = os.open(path, _FLAGS | _DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
            else:
                return file, not _is_cached(file, n_bytes) or self._through_cache(file)
        return os.open(path, _FLAGS), False

    @staticmethod
    def _through_cache(file: int) -> bool:
        """Read on through the cache; False, as it is not `direct` any more."""
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
        return False


class _Range(ctypes.Structure):
    """`struct cachestat_range`; a length of 0 is the whole file."""

    _fields_ = (("at", ctypes.c_uint64), ("n_bytes", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    """`struct cachestat`."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent")
    )


def _is_cached(file: int, n_bytes: int) -> bool:
    """Whether the page cache has a whole file, or a part that is yet to be written back; False
    where the kernel does not tell."""
    whole, pages = _Range(0, 0), _Pages()
    call = (ctypes.c_long(_CACHESTAT), ctypes.c_uint(file), ctypes.byref(whole))
    if _libc.syscall(*call, ctypes.byref(pages), ctypes.c_uint(0)):
        return False
    unwritten = bool(pages.dirty or pages.writeback)
    return unwritten or pages.cached * mmap.PAGESIZE >= n_bytes


def _from(room: Sequence[memoryview], at: int) -> Iterator[memoryview]:
    """What is left of `room` behind its first `at` bytes."""
    for part in room:
        if at < len(part):
            yield part[at:]
        at = max(0, at - len(part))
