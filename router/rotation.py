"""Lines in files that stay small and private: one that grows, and the last ones before it.

`NAME.jsonl` is written to, `NAME.1.jsonl` was before it, and so on. Files belong to the user (0600,
in a folder of 0700). A file that was moved away or removed is made anew. Several processes may
append to one file, since each line is one write.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from kv.audit import MAX_LINE_BYTES

_SUFFIX = ".jsonl"
_NUMBERED = re.compile(r"(?P<name>.+?)(?:\.(?P<number>\d{1,6}))?\.jsonl")


class RotatingLines:
    """At most `files` files of about `file_bytes` each, in `folder`. Every method may raise
    OSError, and may be called again after it did."""

    def __init__(self, folder: Path, name: str, file_bytes: int, files: int) -> None:
        self._folder, self._name = folder, name
        self._file_bytes, self._files = file_bytes, files
        self._path = folder / f"{name}{_SUFFIX}"
        self._fd: int | None = None
        self._torn = False

    def append(self, line: bytes) -> None:
        """Write one line, its end included, at the end of the newest file."""
        fd = self._open_for(len(line))
        # Behind half a line a whole one begins anew.
        written = os.write(fd, b"\n" + line if self._torn else line)
        self._torn = written < len(line) + self._torn
        if self._torn:
            raise OSError(errno.ENOSPC, "half a line was written", str(self._path))

    def close(self) -> None:
        """Give the file back; a later line opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open_for(self, n_bytes: int) -> int:
        """The newest file, open, with room for so many bytes unless it is new."""
        if self._fd is not None and not self._is_newest(self._fd):
            self.close()
        if self._fd is None:
            self._fd = self._open()
        size = os.fstat(self._fd).st_size
        if size and size + n_bytes > self._file_bytes:
            self.close()
            self._shift()
            self._fd = self._open()
        return self._fd

    def _is_newest(self, fd: int) -> bool:
        try:
            there = self._path.lstat()
        except FileNotFoundError:
            return False
        ours = os.fstat(fd)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _open(self) -> int:
        _private(self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o600)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "is no file of this user", str(self._path))
            os.fchmod(fd, 0o600)
            # Whoever wrote last may have been killed in mid-line.
            self._torn = bool(found.st_size) and os.pread(fd, 1, found.st_size - 1) != b"\n"
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _shift(self) -> None:
        """Give each file the next number; those beyond the last number go."""
        for number, path in _numbered(self._folder, self._name):
            if number + 1 >= self._files:
                path.unlink(missing_ok=True)
            else:
                path.rename(self._folder / f"{self._name}.{number + 1}{_SUFFIX}")


def newest_first(place: Path) -> list[Path]:
    """The audit's files in a folder, or `place` itself where it is a file; those of one writer from
    the newest to the oldest."""
    if not place.is_dir():
        return [place]
    names = {found["name"] for path in place.iterdir() if (found := _parsed(path))}
    return [path for name in sorted(names) for _, path in reversed(_numbered(place, name))]


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file; one that is too long to be an entry comes in pieces."""
    with path.open("rb") as file:
        yield from iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """A writer's files from the oldest to the newest, with their numbers."""
    found = ((_parsed(path), path) for path in folder.iterdir())
    files = [(int(it["number"] or 0), path) for it, path in found if it and it["name"] == name]
    return sorted(files, reverse=True)


def _parsed(path: Path) -> re.Match[str] | None:
    return _NUMBERED.fullmatch(path.name)


def _private(folder: Path) -> None:
    """Make the folder if it is not there; raise PermissionError unless it is the user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "is no folder of this user", str(folder))
    if found.st_mode & 0o077:
        mode = f"has mode {stat.S_IMODE(found.st_mode):o}, chmod it to 700"
        raise PermissionError(errno.EPERM, mode, str(folder))
