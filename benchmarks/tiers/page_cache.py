"""Files out of the kernel's page cache, and the proof that they are.

The disk tier syncs nothing, and pages that were not written yet cannot be dropped: hence first
`fsync`, then `posix_fadvise(DONTNEED)`, then `mincore` on a mapping of each file.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def drop(paths: Iterable[Path]) -> int:
    """Drop the pages of these files; returns how many they have. Raises `RuntimeError` if one
    stays in memory."""
    pages = resident = 0
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            there = held(file)
        finally:
            os.close(file)
        pages += len(there)
        resident += sum(there)
    if resident:
        raise RuntimeError(
            f"{resident} of {pages} pages stay in memory; set TMPDIR to a folder on a disk"
        )
    return pages


def held(file: int) -> list[bool]:
    """Which pages of an open file are in memory."""
    size = os.fstat(file).st_size
    if size == 0:
        return []
    with mmap.mmap(file, size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
        address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        answer = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), answer)
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return [bool(page & 1) for page in answer]
