"""Blocks in files: a folder with a byte budget, whose blocks survive the process.

    ROOT/slot-0/lock                                  held by the process that writes here
    ROOT/slot-0/FINGERPRINT/TAG/ab/KEY.kv             one block, sealed (`kv.disk_seal`)

Each process takes the first slot that nobody holds, so that a restarted engine finds what its
predecessor stored, and two engines never count each other's bytes. The budget is a slot's, over
all fingerprints in it: what an older model left is the first to go.

A name goes at once, its file when a thread that may wait for the disk comes to it (`sweep`); the
file counts until it is gone, one that cannot be removed for good. Nothing is synced: a file that a
crash of the machine tore fails its check, and a block that cannot be trusted is removed and
computed again. Files are the user's alone (0700, 0600).
"""

import hashlib
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from kv import disk_files
from kv.disk_read import Reader
from kv.disk_seal import Checked, Seal
from kv.errors import DamagedBlockError, DiskError, LostSlotError

_CHECKED = Checked()
# For how long an erasure waits for what is being written when it comes.
_WRITES_END_S = 60.0

# A key as a file is named by it; somebody's copy of a file may be called anything.
_KEY = re.compile("([0-9a-f]{2})+")

# A tag's folder and a key.
_Name = tuple[str, bytes]


def file_bytes(block_bytes: int, overhead_bytes: int = _CHECKED.overhead_bytes) -> int:
    """What one block takes of the budget."""
    return disk_files.on_disk(block_bytes + overhead_bytes)


class DiskStore:
    """The blocks of one slot. Every method may be called from any thread; `has`, `touch`, `drop`,
    `clear` and `take_removed` never wait for the disk.

    A key is the engine's name of a block; `tag` says whose it is (`kv.salt`), so that all blocks
    of one tenant can be erased, by a process that never saw them stored too.
    """

    def __init__(
        self, root: Path, fingerprint: str, budget_bytes: int, seal: Seal = _CHECKED
    ) -> None:
        """Take a slot and see what it holds; raises `DiskError` if none can be used."""
        self._root, self._fingerprint, self._budget_bytes = root, fingerprint, budget_bytes
        self._seal, self._reader = seal, Reader()
        self._lock = threading.Condition()
        self._sweeping = threading.Lock()
        # Bytes by the tag's folder and the key, the oldest first; and what others left here.
        self._files: OrderedDict[_Name, int] = OrderedDict()
        self._foreign: dict[Path, int] = {}
        # Not found any more: to be unlinked, and what could not be.
        self._leaving: dict[Path, int] = {}
        self._stuck: dict[Path, tuple[int, OSError]] = {}
        self._writing: dict[_Name, bool] = {}  # False once it was erased meanwhile
        self._reading: Counter[_Name] = Counter()
        self._removed: list[bytes] = []
        self._used_bytes = 0
        self._lost = False
        try:
            self._slot, self._held = disk_files.take_slot(root)
            self._scan()
        except OSError as error:
            remedy = "set tiers.disk.path to a folder of yours"
            raise DiskError(str(root), f"cannot be used: {error.strerror}", remedy) from error

    @property
    def used_bytes(self) -> int:
        """Bytes that the slot's files take, those being written and removed included."""
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
        written, and leaves nothing behind then; `LostSlotError` if the slot was taken away."""
        self._check_slot()
        name, size = (_folder(tag), key), file_bytes(len(block), self._seal.overhead_bytes)
        claimed = self._claim(name, size, wanted)
        if not claimed:
            return claimed is None
        path = self._path(name)
        draft, kept = path.with_suffix(".tmp"), False
        try:
            disk_files.write(draft, self._seal.sealed(self._full_name(tag, key), block))
            draft.rename(path)
            with self._lock:
                kept = True
                if self._writing[name] and not self._lost:
                    self._files[name] = size
                else:
                    self._leaving[path] = size
        finally:
            self._written(name, size, None if kept else draft)
        return True

    def get(self, tag: str, key: bytes, into: memoryview) -> None:
        """Read a block into `into`, which must not be used if this raises: `DamagedBlockError`
        for bytes that are not what was stored, `OSError` if they cannot be read. The block is
        gone then."""
        name = (_folder(tag), key)
        path, room = self._path(name), self._seal.room(into, self._reader.scratch)
        try:
            with self._reads(name):
                whole = self._reader.read(path, room, len(into) + self._seal.overhead_bytes)
                if not whole or not self._seal.opened(self._full_name(tag, key), room, into):
                    raise DamagedBlockError(str(path), "its checksum is another", "recompute it")
        except (OSError, DamagedBlockError):
            with self._lock:
                self._drop(name)
            self.sweep()
            raise
        with suppress(OSError):
            os.utime(path)  # a later process goes by it
        self.touch(tag, key)

    def drop(self, tag: str) -> int:
        """Take the name of every block with this tag; returns how many were here. Their files,
        and those in other slots, are `purge`'s."""
        folder = _folder(tag)
        with self._lock:
            mine = [name for name in self._files if name[0] == folder]
            for name in mine:
                self._drop(name)
            for name in self._writing:
                self._writing[name] &= name[0] != folder
            for path in [path for path in self._foreign if path.parent.parent.name == folder]:
                self._leaving[path] = self._foreign.pop(path)
        return len(mine)

    def purge(self, tag: str) -> None:
        """Unlink the files of a tag that was dropped, in slots that nobody holds too. Bytes on the
        medium are released, not overwritten. Raises `DiskError` if files are left."""
        folder = _folder(tag)
        with self._lock:
            for path in self._of(folder):
                self._leaving[path] = self._stuck.pop(path)[0]
            ended = self._lock.wait_for(lambda: not self._erased_meanwhile(folder), _WRITES_END_S)
        self.sweep()
        left: list[OSError] = []
        if not ended:
            left.append(TimeoutError(0, f"one was written for {_WRITES_END_S:.0f} s"))
        with self._lock:
            left += [self._stuck[path][1] for path in self._of(folder)]
        # Half written ones of a process that was killed too.
        for path in self._root.glob(f"slot-*/*/{folder}/*/*"):
            if not path.is_relative_to(self._slot) and (error := disk_files.unlink(path)):
                left.append(error)
        if left:
            numbers = f"{len(left)} files of an erased tenant are left: {left[0].strerror}"
            raise DiskError(str(self._root), numbers, "make it writable and erase again")

    def clear(self) -> None:
        """Take the name of every block of this fingerprint; their files are `sweep`'s."""
        with self._lock:
            for name in list(self._files):
                self._drop(name)
            self._writing = dict.fromkeys(self._writing, False)

    def sweep(self) -> None:
        """Unlink the files of blocks that are gone."""
        with self._sweeping:
            if not self._leaving or self._gone():
                return
            with self._lock:
                leaving = list(self._leaving.items())
            for path, size in leaving:
                error = disk_files.unlink(path)
                with self._lock:
                    if self._leaving.pop(path, None) is None:
                        continue  # the slot is lost
                    if error is None:
                        self._used_bytes -= size
                    else:
                        self._stuck[path] = (size, error)

    def take_removed(self) -> list[bytes]:
        """Keys that went since the last call."""
        with self._lock:
            removed, self._removed = self._removed, []
        return removed

    def close(self) -> None:
        """Give the slot back."""
        os.close(self._held)

    # ------------------------------------------------------------------ with the lock held

    def _choose(self, excess: int) -> bool:
        """Have what others left, then the oldest blocks, leave until `excess` bytes less are used;
        False, and none does, if that cannot be."""
        excess -= sum(self._leaving.values())
        foreign: list[Path] = []
        going: list[_Name] = []
        for path, freed in self._foreign.items():
            if excess <= 0:
                break
            foreign.append(path)
            excess -= freed
        for name, freed in self._files.items():
            if excess <= 0:
                break
            if not self._reading[name]:
                going.append(name)
                excess -= freed
        if excess > 0:
            return False
        self._leaving.update((path, self._foreign.pop(path)) for path in foreign)
        for name in going:
            self._drop(name)
        return True

    def _drop(self, name: _Name) -> None:
        if name in self._files:
            self._leaving[self._path(name)] = self._files.pop(name)
            self._removed.append(name[1])

    def _of(self, folder: str) -> list[Path]:
        """Files of a tag that could not be removed."""
        return [path for path in self._stuck if path.parent.parent.name == folder]

    def _erased_meanwhile(self, folder: str) -> bool:
        """Whether a block of a tag is still being written although it was erased."""
        return any(name[0] == folder and not wanted for name, wanted in self._writing.items())

    # ------------------------------------------------------------------ without

    def _claim(self, name: _Name, size: int, wanted: Callable[[], bool]) -> bool | None:
        """Make room for a block that is to be written, and count it; None if it is here, False
        without room."""
        path = self._path(name)
        with self._lock:
            for stuck in {path, path.with_suffix(".tmp")} & self._stuck.keys():
                self._leaving[stuck] = self._stuck.pop(stuck)[0]
        while True:
            with self._lock:
                if name in self._files or name in self._writing:
                    return None
                excess = self._used_bytes + size - self._budget_bytes
                clear = self._leaving.keys().isdisjoint({path, path.with_suffix(".tmp")})
                if not wanted() or path in self._stuck or not self._choose(excess):
                    return False
                if clear and excess <= 0:
                    self._writing[name] = True
                    self._used_bytes += size
                    return True
            self.sweep()

    def _written(self, name: _Name, size: int, failed: Path | None) -> None:
        """The end of a write; `failed` is the draft of one that came to nothing."""
        error = disk_files.unlink(failed) if failed is not None else None
        with self._lock:
            erased = not self._writing.pop(name)
            if failed is not None and error is not None:
                self._stuck[failed] = (size, error)
            elif failed is not None and not self._lost:
                self._used_bytes -= size
            self._lock.notify_all()
        if erased:
            self.sweep()

    def _check_slot(self) -> None:
        if self._gone():
            numbers = "it was taken away, or another process has made it anew"
            raise LostSlotError(str(self._slot), numbers, "restart the replica")

    def _gone(self) -> bool:
        """Whether the slot is no longer ours: another process may write there. Nothing is found
        from then on, and nothing removed."""
        if not self._lost and not disk_files.still_held(self._slot, self._held):
            with self._lock:
                self._lost = True
                self._removed += [name[1] for name in self._files]
                for files in (self._files, self._foreign, self._leaving, self._stuck):
                    files.clear()
                self._used_bytes = 0
        return self._lost

    def _scan(self) -> None:
        for draft in self._slot.glob("*/*/*/*.tmp"):
            disk_files.unlink(draft)
        found = []
        for path in self._slot.glob("*/*/*/*.kv"):
            with suppress(FileNotFoundError):  # another engine erases a tenant in all slots
                found.append((path.stat(follow_symlinks=False), path))
        for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
            size = disk_files.on_disk(status.st_size)
            self._used_bytes += size
            if path.parents[2].name == self._fingerprint and _KEY.fullmatch(path.stem):
                self._files[path.parents[1].name, bytes.fromhex(path.stem)] = size
            else:
                self._foreign[path] = size
        self._choose(self._used_bytes - self._budget_bytes)
        self.sweep()
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

    def _full_name(self, tag: str, key: bytes) -> bytes:
        """What a file is sealed for: one in another's place is damaged."""
        return f"{self._fingerprint}/{tag}/".encode() + key


@cache
def _folder(tag: str) -> str:
    return hashlib.sha256(tag.encode()).hexdigest()[:16]
