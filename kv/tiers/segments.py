"""Blocks on disk: segment files that are only appended to, in a folder of the user's own.

**What an acknowledgement means.** `append` writes; `commit` makes everything appended since the
last one durable by one fdatasync a file, and returns the keys: those may be acknowledged. They
survive a `kill -9` and a loss of power. A block that was appended and not committed may be there
after a crash or not; if it is, its bytes are right.

**What is read.** A payload's checksum is verified at each read; a block that fails is a miss and is
dropped. Opening reads headers, keys and notes. It cuts a torn tail, and where a header is damaged
it goes on at the next one that is whole. Nothing is ever unpickled.

**Space.** All files together never exceed `budget_bytes`. A deleted block is marked in place, which
needs no room; its space comes back when its segment is compacted, a copy of at most
`segment_bytes` at a time, and only of segments a quarter of which is dead, so that at most three
bytes are copied for each one won. Up to `capacity_bytes` of frames can therefore always be stored.

One process at a time has the folder; not for several threads at once.
"""

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_64_intdigest

from kv.errors import SegmentError, SegmentFullError
from kv.tiers import frames
from kv.tiers.files import Place, Segment, failed, own, sync_folder, whole_frames, write_at, zero

_NAME = re.compile(r"(\d{12})\.seg")
# A segment is compacted once this share of it is dead.
_DEAD_SHARE = 0.25


class SegmentStore:
    """See the module. Opening raises SegmentError for a folder that others may read, that another
    process has open, or that holds more than its budget; and for a budget below three segments.
    """

    def __init__(self, folder: Path, budget_bytes: int, segment_bytes: int = 64 << 20) -> None:
        if segment_bytes <= frames.PREFIX_BYTES or budget_bytes < 3 * segment_bytes:
            raise SegmentError(
                str(folder),
                f"a budget of {budget_bytes} bytes for segments of {segment_bytes}",
                "give at least three segments",
            )
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._segment_bytes = segment_bytes
        self._segments: dict[int, Segment] = {}
        self._index: dict[bytes, Place] = {}
        self._active: Segment | None = None
        self._uncommitted: dict[bytes, None] = {}
        self._unsynced: dict[int, Segment] = {}
        self._folder_unsynced = False
        self._lock_fd = own(folder)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    # -- the blocks

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    @property
    def n_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(segment.n_bytes for segment in self._segments.values())

    @property
    def live_bytes(self) -> int:
        """Bytes of the frames of stored blocks."""
        return sum(segment.live_bytes for segment in self._segments.values())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of frames (`frame_bytes`) that always find room, whatever was deleted before."""
        return int((self._budget_bytes - 2 * self._segment_bytes) * (1 - _DEAD_SHARE))

    @staticmethod
    def frame_bytes(key: bytes, note: bytes, payload_bytes: int) -> int:
        """What a block takes on disk."""
        return frames.HEADER_BYTES + len(key) + len(note) + payload_bytes

    def notes(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Key, note and payload bytes of every stored block, in the order they were stored in."""
        places = sorted(self._index.values(), key=lambda at: (at.segment.number, at.offset))
        for place in places:
            yield place.frame.key, place.frame.note, place.frame.payload_bytes

    def append(self, key: bytes, note: bytes, payload: bytes | memoryview) -> None:
        """Write a block, durable with the next `commit`; one that is here already changes nothing.

        `note` is what the caller wants to know at the next opening. Raises SegmentFullError where
        budget or disk have no room, SegmentError where the disk fails; then nothing has changed.
        """
        if key in self._index:
            self._uncommitted.setdefault(key)
            return
        n_bytes = self.frame_bytes(key, note, len(payload))
        largest = self._segment_bytes - frames.PREFIX_BYTES
        if n_bytes > largest or not 0 < len(key) <= frames.MAX_KEY_BYTES:
            raise SegmentFullError(
                f"block {key.hex()[:16]}",
                f"{n_bytes} bytes with a key of {len(key)}, a segment takes {largest}",
                "raise the size of a segment",
            )
        self._make_room(n_bytes)
        self._write(key, note, payload)
        self._uncommitted[key] = None

    def commit(self) -> tuple[bytes, ...]:
        """Make all that was appended durable; the keys, which may be acknowledged now.

        Raises SegmentError where the disk fails: what was appended since the last commit is then
        lost, since a second fsync after a failed one proves nothing.
        """
        try:
            self._sync()
        except OSError as error:
            lost_blocks = self._lose_uncommitted()
            raise failed(self._folder, f"fsync of {lost_blocks} blocks", error) from error
        committed = tuple(key for key in self._uncommitted if key in self._index)
        self._uncommitted.clear()
        return committed

    def read(self, key: bytes) -> bytes | None:
        """The block's bytes as they were appended; None if it is not here, or no longer right."""
        place = self._index.get(key)
        if place is None:
            return None
        frame = place.frame
        with suppress(OSError):
            offset = place.offset + frame.payload_offset
            payload = os.pread(place.segment.fd, frame.payload_bytes, offset)
            whole = len(payload) == frame.payload_bytes
            if whole and xxh3_64_intdigest(payload) == frame.payload_sum:
                return payload
        self.delete((key,))
        return None

    def delete(self, keys: Iterable[bytes]) -> None:
        """These blocks are gone, after a restart too once `commit` has returned."""
        for key in keys:
            place = self._index.pop(key, None)
            if place is None:
                continue
            self._uncommitted.pop(key, None)
            place.segment.live_bytes -= place.frame.n_bytes
            place.segment.keys.discard(key)
            self._bury(place)

    def erase(self, keys: Iterable[bytes]) -> None:
        """Delete blocks, and overwrite with zeros all that is not of a stored block: theirs, and
        what was deleted or torn earlier, whoever wrote it. It is on the disk when this returns.

        Raises SegmentError where the disk fails; what was appended since the last commit is then
        lost, as it is by a failed `commit`. What the file system or the drive keeps of old bytes
        elsewhere (snapshots, copies on write, worn cells) is not reached.
        """
        self.delete(keys)
        try:
            for segment in self._segments.values():
                self._wipe(segment)
                self._unsynced[segment.number] = segment
            self._sync()
        except OSError as error:
            self._lose_uncommitted()
            raise failed(self._folder, "erasing", error) from error

    def compact(self) -> bool:
        """Compact the segment with the most dead bytes, if that is a quarter of it.

        Copies at most one segment. Raises as `append` and `commit` do; no committed block is lost.
        """
        segments = self._segments.values()
        if not segments:
            return False
        worst = max(segments, key=lambda segment: segment.n_bytes - segment.live_bytes)
        dead_bytes = worst.n_bytes - worst.live_bytes - frames.PREFIX_BYTES
        if dead_bytes <= 0 or dead_bytes < _DEAD_SHARE * worst.n_bytes:
            return False
        if worst is self._active:
            self._active = None
        self._move_out_of(worst)
        return True

    def close(self) -> None:
        """Close all files and let another process have the folder. Commits nothing."""
        for segment in self._segments.values():
            os.close(segment.fd)
        self._segments.clear()
        self._index.clear()
        self._active = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- writing

    def _bury(self, place: Place) -> None:
        """Mark a frame dead in the file."""
        # A disk that does not even take this has the block dropped by its checksum, or keeps one
        # that nobody asked to be erased.
        with suppress(OSError):
            os.pwrite(place.segment.fd, bytes([frames.DEAD]), place.offset + frames.STATE_OFFSET)
            self._unsynced[place.segment.number] = place.segment

    def _wipe(self, segment: Segment) -> None:
        """Zeros between the live frames: opening steps over them as over anything damaged."""
        at = frames.PREFIX_BYTES
        for place in sorted((self._index[key] for key in segment.keys), key=lambda p: p.offset):
            zero(segment.fd, at, place.offset - at)
            at = place.offset + place.frame.n_bytes
        zero(segment.fd, at, segment.n_bytes - at)

    def _make_room(self, n_bytes: int) -> None:
        """Compact until an append fits, with a segment to spare for the next compaction."""
        limit_bytes = self._budget_bytes - self._segment_bytes
        while self.n_bytes + n_bytes + frames.PREFIX_BYTES > limit_bytes:
            if not self.compact():
                raise SegmentFullError(
                    str(self._folder),
                    f"{n_bytes} bytes more, {self.live_bytes} stored of {self._budget_bytes}",
                    "raise the budget of the disk, or store less",
                )

    def _move_out_of(self, segment: Segment) -> None:
        originals: list[Place] = []
        try:
            for key in sorted(segment.keys, key=lambda key: self._index[key].offset):
                place, payload = self._index[key], self.read(key)
                if payload is not None:
                    self._write(key, place.frame.note, payload)
                    originals.append(place)
            # The copies are durable before their originals go.
            self._sync()
            os.unlink(segment.path)
        except (OSError, SegmentError) as error:
            self._go_back_to(originals)
            if isinstance(error, SegmentError):
                raise
            self._lose_uncommitted()
            raise failed(self._folder, f"compacting {segment.path.name}", error) from error
        self._folder_unsynced = True
        del self._segments[segment.number]
        os.close(segment.fd)

    def _go_back_to(self, originals: list[Place]) -> None:
        """Copies that may not be on the disk count for nothing."""
        self._active = None
        for place in originals:
            copy = self._index[place.frame.key]
            copy.segment.live_bytes -= copy.frame.n_bytes
            copy.segment.keys.discard(place.frame.key)
            self._index[place.frame.key] = place
            self._bury(copy)

    def _lose_uncommitted(self) -> int:
        """After a failed fsync nobody knows what is durable: how many blocks that costs."""
        lost = tuple(self._uncommitted)
        self._active = None
        self.delete(lost)
        return len(lost)

    def _sync(self) -> None:
        for written in self._unsynced.values():
            os.fdatasync(written.fd)
        if self._folder_unsynced:
            sync_folder(self._folder)
        self._unsynced.clear()
        self._folder_unsynced = False

    def _write(self, key: bytes, note: bytes, payload: bytes | memoryview) -> None:
        n_bytes = self.frame_bytes(key, note, len(payload))
        segment = self._active
        if segment is None or segment.n_bytes + n_bytes > self._segment_bytes:
            segment = self._active = self._begin()
        head = frames.packed(segment.mark, key, note, payload)
        try:
            write_at(segment.fd, segment.n_bytes, head, payload)
        except OSError as error:
            # What was written of it goes; if even that fails, opening will cut it.
            with suppress(OSError):
                os.ftruncate(segment.fd, segment.n_bytes)
            raise failed(self._folder, f"writing {n_bytes} bytes", error) from error
        frame = frames.unpacked(segment.mark, head)
        assert frame is not None
        self._admit(Place(segment, segment.n_bytes, frame))
        segment.n_bytes += n_bytes
        self._unsynced[segment.number] = segment

    def _begin(self) -> Segment:
        number = max(self._segments, default=0) + 1
        path = self._folder / f"{number:012d}.seg"
        mark = secrets.token_bytes(frames.MARK_BYTES)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = -1
        try:
            fd = os.open(path, flags, 0o600)
            write_at(fd, 0, frames.MAGIC + mark, b"")
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                path.unlink(missing_ok=True)
            raise failed(self._folder, f"a new segment {path.name}", error) from error
        self._folder_unsynced = True
        segment = Segment(number, path, fd, mark, frames.PREFIX_BYTES)
        self._segments[number] = segment
        return segment

    # -- opening

    def _load(self) -> None:
        for path in sorted(self._folder.iterdir()):
            named = _NAME.fullmatch(path.name)
            if named is not None:
                self._load_segment(int(named[1]), path)
        if self.n_bytes > self._budget_bytes:
            raise SegmentError(
                str(self._folder),
                f"{self.n_bytes} bytes stored, a budget of {self._budget_bytes}",
                "raise the budget, or empty the folder",
            )

    def _load_segment(self, number: int, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise failed(self._folder, f"opening {path.name}", error) from error
        prefix = os.pread(fd, frames.PREFIX_BYTES, 0)
        if len(prefix) < frames.PREFIX_BYTES or not prefix.startswith(frames.MAGIC):
            # Killed as it began, or damaged at its start: without its mark nothing can be read.
            os.close(fd)
            path.unlink()
            return
        segment = Segment(number, path, fd, prefix[len(frames.MAGIC) :], os.fstat(fd).st_size)
        self._segments[number] = segment
        end = frames.PREFIX_BYTES
        for place in whole_frames(segment):
            end = place.offset + place.frame.n_bytes
            if place.frame.live:
                self._find(place)
        if end < segment.n_bytes:
            os.ftruncate(fd, end)
            segment.n_bytes = end

    def _find(self, place: Place) -> None:
        known = self._index.get(place.frame.key)
        self._admit(place)
        if known is not None:
            # A compaction was cut short. Its copy may not be whole, what it copied from is.
            self.delete((place.frame.key,))
            self._admit(known)

    def _admit(self, place: Place) -> None:
        self._index[place.frame.key] = place
        place.segment.keys.add(place.frame.key)
        place.segment.live_bytes += place.frame.n_bytes
