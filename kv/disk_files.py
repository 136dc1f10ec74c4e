"""The files under a disk tier: whose they are, who holds a slot, writing and removing."""

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kv.errors import DiskError

LOCK = "lock"
_MOST_SLOTS = 256
# What a file system gives out at least; files are counted in whole ones.
_UNIT_BYTES = 4096


def on_disk(n_bytes: int) -> int:
    """What a file of so many bytes takes."""
    return -(-n_bytes // _UNIT_BYTES) * _UNIT_BYTES


def take_slot(root: Path) -> tuple[Path, int]:
    """A slot of our own below `root`, and the open file that holds it.

    Raises `DiskError` for a root or slot that is not this user's alone to write to, `OSError` for
    one that cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(root)
    for number in range(_MOST_SLOTS):
        slot = root / f"slot-{number}"
        slot.mkdir(mode=0o700, exist_ok=True)
        _refuse_others(slot)
        slot.chmod(0o700)  # one that somebody made by hand may be read by others
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        held = os.open(slot / LOCK, flags, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            continue
        return slot, held
    raise OSError(0, f"all {_MOST_SLOTS} slots are held")


def still_held(slot: Path, held: int) -> bool:
    """Whether the slot's lock file is the one that `held` is: a folder that was taken away, or made
    anew by another process, has none or another."""
    try:
        found = (slot / LOCK).lstat()
    except OSError:
        return False
    ours = os.fstat(held)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


def write(path: Path, parts: Sequence[memoryview | bytes]) -> None:
    """A new file of these parts, three folders below one that is there."""
    for folder in (path.parents[2], path.parents[1], path.parents[0]):
        folder.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o600)
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(file, left) :]
    finally:
        os.close(file)


def unlink(path: Path) -> OSError | None:
    """Remove a file that may be gone already; why it is still there, if it is."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return error if os.path.lexists(path) else None
    return None


def _refuse_others(folder: Path) -> None:
    """Raise `DiskError` unless this is a folder of the user's that nobody else may write to:
    who may could put blocks there, or have ours written to another place."""
    found, user = folder.lstat(), os.geteuid()
    mine = "or set tiers.disk.path to a folder of yours"
    if stat.S_ISLNK(found.st_mode):
        raise DiskError(str(folder), "is a symlink", f"remove it, {mine}")
    if found.st_uid != user:
        numbers = f"belongs to user {found.st_uid}, not {user}"
        raise DiskError(str(folder), numbers, f"chown it, {mine}")
    if found.st_mode & 0o022:
        numbers = f"mode {stat.S_IMODE(found.st_mode):o} lets others write to it"
        raise DiskError(str(folder), numbers, f"chmod go-w it, {mine}")
