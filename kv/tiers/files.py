"""The files under a segment store: owning a folder, reading and writing frames in a file."""

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kv.errors import SegmentError, SegmentFullError
from kv.tiers import frames
from kv.tiers.frames import Frame

_LOCK = "lock"
# How much is read at once while looking for the next whole header, and written in zeros.
_SCAN_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class Segment:
    number: int
    path: Path
    fd: int
    mark: bytes
    n_bytes: int
    live_bytes: int = 0
    keys: set[bytes] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Place:
    segment: Segment
    offset: int
    frame: Frame


def own(folder: Path) -> int:
    """The lock of a folder that is the user's alone, made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SegmentError(
                str(folder),
                f"user {found.st_uid}, mode {found.st_mode & 0o777:o}",
                f"give user {os.geteuid()} a folder of its own, with mode 700",
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(folder / _LOCK, flags, 0o600)
    except OSError as error:
        raise failed(folder, "opening it", error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise SegmentError(
            str(folder), "another process has it open", "give each vault a folder of its own"
        ) from error
    return fd


def sync_folder(folder: Path) -> None:
    """Make new and removed names of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def whole_frames(segment: Segment) -> Iterator[Place]:
    """All whole frames of a file, over damaged ones."""
    offset = frames.PREFIX_BYTES
    while offset < segment.n_bytes:
        frame = _frame_at(segment, offset)
        if frame is None:
            offset = _next_mark(segment, offset + 1)
            continue
        yield Place(segment, offset, frame)
        offset += frame.n_bytes


def _frame_at(segment: Segment, offset: int) -> Frame | None:
    header = os.pread(segment.fd, frames.HEADER_BYTES, offset)
    found = frames.sizes(segment.mark, header)
    if found is None or offset + frames.HEADER_BYTES + sum(found) > segment.n_bytes:
        return None
    named = os.pread(segment.fd, found[0] + found[1], offset + frames.HEADER_BYTES)
    return frames.unpacked(segment.mark, header + named)


def _next_mark(segment: Segment, offset: int) -> int:
    """Where the segment's mark comes next, or its end."""
    while offset < segment.n_bytes:
        read = os.pread(segment.fd, _SCAN_BYTES, offset)
        at = read.find(segment.mark)
        if at >= 0:
            return offset + at
        offset += max(1, len(read) - frames.MARK_BYTES + 1)
    return segment.n_bytes


def write_at(fd: int, offset: int, head: bytes, payload: bytes | memoryview) -> None:
    """Both, one behind the other, in one call where the system takes them whole."""
    parts = [memoryview(head), memoryview(payload).cast("B")]
    while any(parts):
        written = os.pwritev(fd, parts, offset)
        offset += written
        for at, part in enumerate(parts):
            taken = min(written, len(part))
            parts[at] = part[taken:]
            written -= taken


def zero(fd: int, offset: int, n_bytes: int) -> None:
    """Overwrite a part of a file."""
    zeros = bytes(min(n_bytes, _SCAN_BYTES))
    while n_bytes > 0:
        written = os.pwrite(fd, zeros[:n_bytes], offset)
        offset += written
        n_bytes -= written


def failed(folder: Path, doing: str, error: OSError) -> SegmentError:
    """What to raise for an error of the disk: whether it is full is told apart."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    kind, remedy = (
        (SegmentFullError, "free space on the disk, or lower the budget")
        if full
        else (SegmentError, "look at the disk and its permissions")
    )
    return kind(str(folder), f"{doing}: {error.strerror}", remedy)
