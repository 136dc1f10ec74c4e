"""Blocks in files: a folder with a byte budget, whose blocks survive the process.

    ROOT/slot-0/lock                                  held by the process that writes here
    ROOT/slot-0/FINGERPRINT/TAG/ab/KEY.kv             one block, then 16 bytes of checksum

Each process takes the first slot that nobody holds, so that a restarted engine finds what its
predecessor stored, and two engines never count each other's bytes. The budget is a slot's, over
all fingerprints in it: what an older model left is the first to go.

Nothing is synced: a file that a crash of the machine tore fails its checksum, and a block that
cannot be trusted is removed and computed again. Files are the user's alone (0700, 0600).
"""

import fcntl
import hashlib
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import xxhash

from kv.errors import DamagedBlockError, DiskError

_CHECK_BYTES = 16
# What a file system gives out at least; files are counted in whole ones.
_UNIT_BYTES = 4096
_MOST_SLOTS = 256

# A key as a file is named by it; somebody's copy of a file may be called anything.
_KEY = re.compile("([0-9a-f]{2})+")

# A tag's folder and a key.
_Name = tuple[str, bytes]


def file_bytes(block_bytes: int) -> int:
    """What one block takes of the budget."""
    return -(-(block_bytes + _CHECK_BYTES) // _UNIT_BYTES) * _UNIT_BYTES


class DiskStore:
    """The blocks of one slot. Every method may be called from any thread.

    A key is the engine's name of a block; `tag` says whose it is (`kv.salt`), so that all blocks
    of one tenant can be erased, by a process that never saw them stored too.
    """

    def __init__(self, root: Path, fingerprint: str, budget_bytes: int) -> None:
        """Take a slot and see what it holds; raises `DiskError` if none can be used."""
        self._root, self._fingerprint, self._budget_bytes = root, fingerprint, budget_bytes
        self._lock = threading.Lock()
        # Bytes by the tag's folder and the key, the oldest first; and what others left here.
        self._files: OrderedDict[_Name, int] = OrderedDict()
        self._foreign: dict[Path, int] = {}
        self._writing: dict[_Name, bool] = {}  # False once it was erased meanwhile
        self._reading: Counter[_Name] = Counter()
        self._removed: list[bytes] = []
        self._used_bytes = 0
        try:
            self._slot, self._held = _take_slot(root)
            self._scan()
        except OSError as error:
            remedy = "set tiers.disk.path to a folder of yours"
            raise DiskError(str(root), f"cannot be used: {error.strerror}", remedy) from error

    @property
    def used_bytes(self) -> int:
        """Bytes that the slot's files take, those being written included."""
        return self._used_bytes

    def has(self, tag: str, key: bytes) -> bool:
        """Whether the block is here to be read, as far as is known without reading it."""
        return (_folder(tag), key) in self._files

    def held(self) -> list[bytes]:
        """The key of every block that is here to be read, the oldest first."""
        with self._lock:
            return [key for _, key in self._files]

    def touch(self, tag: str, key: bytes) -> None:
        """The block was of use: it is the last to go."""
        with self._lock, suppress(KeyError):
            self._files.move_to_end((_folder(tag), key))

    def put(
        self, tag: str, key: bytes, block: memoryview, wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Store a block; False if there is no room for it, or if it is not `wanted` any more: an
        erasure that comes after that was asked removes it. Raises `OSError` if it cannot be
        written, and leaves nothing behind then."""
        name, size = (_folder(tag), key), file_bytes(len(block))
        with self._lock:
            if name in self._files or name in self._writing:
                return True
            if not wanted() or not self._make_room(size):
                return False
            self._writing[name] = True
            self._used_bytes += size
        path = self._path(name)
        draft, kept = path.with_suffix(".tmp"), False
        try:
            _write(draft, block, self._check(tag, key, block))
            with self._lock:
                if self._writing[name]:
                    draft.rename(path)
                    self._files[name], kept = size, True
        finally:
            _unlink(draft)
            with self._lock:
                del self._writing[name]
                self._used_bytes -= 0 if kept else size
        return True

    def get(self, tag: str, key: bytes, into: memoryview) -> None:
        """Read a block into `into`, which must not be used if this raises: `DamagedBlockError`
        for bytes that are not what was stored, `OSError` if they cannot be read. The block is
        gone then."""
        name = (_folder(tag), key)
        path = self._path(name)
        with self._reads(name):
            try:
                check = _read(path, into)
                if check != self._check(tag, key, into):
                    raise DamagedBlockError(str(path), "its checksum is another", "recompute it")
            except (OSError, DamagedBlockError):
                with self._lock:
                    self._drop(name)
                raise
        with suppress(OSError):
            os.utime(path)  # a later process goes by it
        self.touch(tag, key)

    def erase(self, tag: str) -> int:
        """Remove every block with this tag, in slots that nobody holds too; returns how many of
        this slot. Bytes on the medium are released, not overwritten. Raises `DiskError` if files
        are left; none of them is found by this process any more."""
        folder = _folder(tag)
        with self._lock:
            mine = [name for name in self._files if name[0] == folder]
            for name in mine:
                self._drop(name)
            for name in self._writing:
                self._writing[name] &= name[0] != folder
            for path in [path for path in self._foreign if path.parent.parent.name == folder]:
                self._used_bytes -= self._foreign.pop(path)
        # Half written ones of a process that was killed too.
        found = self._root.glob(f"slot-*/*/{folder}/*/*")
        left = [error for path in found if (error := _unlink(path)) is not None]
        if left:
            numbers = f"{len(left)} files of an erased tenant are left: {left[0].strerror}"
            raise DiskError(str(self._root), numbers, "make it writable and erase again")
        return len(mine)

    def clear(self) -> None:
        """Remove every block of this slot and fingerprint."""
        with self._lock:
            for name in list(self._files):
                self._drop(name)
            self._writing = dict.fromkeys(self._writing, False)

    def take_removed(self) -> list[bytes]:
        """Keys that went since the last call."""
        with self._lock:
            removed, self._removed = self._removed, []
        return removed

    def close(self) -> None:
        """Give the slot back."""
        os.close(self._held)

    # ------------------------------------------------------------------ with the lock held

    def _make_room(self, size: int) -> bool:
        """Remove what others left, then the oldest blocks, until `size` bytes more fit."""
        excess = self._used_bytes + size - self._budget_bytes
        going: list[_Name] = []
        while excess > 0 and self._foreign:
            path, freed = self._foreign.popitem()
            _unlink(path)
            self._used_bytes -= freed
            excess -= freed
        for name, freed in self._files.items():
            if excess <= 0:
                break
            if not self._reading[name]:
                going.append(name)
                excess -= freed
        if excess > 0:
            return False
        for name in going:
            self._drop(name)
        return True

    def _drop(self, name: _Name) -> None:
        # A file that cannot be removed is not found any more all the same.
        _unlink(self._path(name))
        if name in self._files:
            self._used_bytes -= self._files.pop(name)
            self._removed.append(name[1])

    # ------------------------------------------------------------------ without

    def _scan(self) -> None:
        for draft in self._slot.glob("*/*/*/*.tmp"):
            _unlink(draft)
        found = []
        for path in self._slot.glob("*/*/*/*.kv"):
            with suppress(FileNotFoundError):  # another engine erases a tenant in all slots
                found.append((path.stat(), path))
        for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
            size = file_bytes(status.st_size - _CHECK_BYTES)
            self._used_bytes += size
            if path.parents[2].name == self._fingerprint and _KEY.fullmatch(path.stem):
                self._files[path.parents[1].name, bytes.fromhex(path.stem)] = size
            else:
                self._foreign[path] = size
        self._make_room(0)
        self._removed.clear()

    @contextmanager
    def _reads(self, name: _Name) -> Iterator[None]:
        """It is not removed to make room meanwhile: its bytes would stay on the disk."""
        with self._lock:
            self._reading[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading[name] -= 1
                self._reading += Counter()  # forgets those at 0

    def _path(self, name: _Name) -> Path:
        folder, key = name[0], name[1].hex()
        return self._slot / self._fingerprint / folder / key[:2] / f"{key}.kv"

    def _check(self, tag: str, key: bytes, block: memoryview) -> bytes:
        """Over the names too: a file in another's place is damaged."""
        check = xxhash.xxh3_128(f"{self._fingerprint}/{tag}/".encode() + key)
        check.update(block)
        return check.digest()


@cache
def _folder(tag: str) -> str:
    return hashlib.sha256(tag.encode()).hexdigest()[:16]


def _unlink(path: Path) -> OSError | None:
    """Remove a file that may be gone already; why it is still there, if it is."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _take_slot(root: Path) -> tuple[Path, int]:
    """A slot of our own, and the open file that holds it."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(_MOST_SLOTS):
        slot = root / f"slot-{number}"
        slot.mkdir(mode=0o700, exist_ok=True)
        slot.chmod(0o700)  # one that somebody made by hand
        held = os.open(slot / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            continue
        return slot, held
    raise OSError(0, f"all {_MOST_SLOTS} slots are held")


def _write(path: Path, block: memoryview, check: bytes) -> None:
    for folder in (path.parents[2], path.parents[1], path.parents[0]):
        folder.mkdir(mode=0o700, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for part in (block, memoryview(check)):
            while part:
                part = part[os.write(file, part) :]
    finally:
        os.close(file)


def _read(path: Path, into: memoryview) -> bytes:
    """Fill `into`; returns the checksum behind the block. A file of another size has none."""
    check = bytearray(_CHECK_BYTES)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size != len(into) + _CHECK_BYTES:
            return b""
        for part in (into, memoryview(check)):
            while part:
                count = os.readv(file, [part])
                if count == 0:
                    return b""
                part = part[count:]
    finally:
        os.close(file)
    return bytes(check)
