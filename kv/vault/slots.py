"""The memory of a shard: what lies where, whether it is whole, and who may still touch it.

A slot's memory is given to another block only once nobody may write there: its client has said that
it is done, or is gone. Free memory is always zeros, so that nothing of a block outlives it. A slot
goes through three phases: its client writes, its frame was found whole, its block is stored.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

from kv.codecs.frame import read_frame, told_checksum
from kv.errors import CodecError, VaultError
from kv.vault.arena import Arena, Extent
from kv.vault.orders import Put

_ZEROS = memoryview(bytes(1 << 20))


class Phase(Enum):
    """How far a slot's block is."""

    GRANTED = auto()
    CHECKED = auto()
    STORED = auto()


@dataclass(slots=True, eq=False)
class Slot:
    """One frame of `n_bytes` and its memory. `put` is None for one that came from disk.

    Without its name (`named`) nobody finds it; its memory is still taken.
    """

    key: bytes
    codec: str
    n_bytes: int
    extents: tuple[Extent, ...]
    put: Put | None = None
    phase: Phase = Phase.GRANTED
    checksum: int = 0
    named: bool = True
    readers: set[str] = field(default_factory=set)


class Slots:
    """The slots of one memory by key, least recently used first.

    With an `extent` stored frames are on disk as well, and those that nobody reads go when room is
    wanted. Not for several threads at once.
    """

    def __init__(self, memory: memoryview, extent: bool) -> None:
        self._memory = memory.cast("B")
        self._extent = extent
        self.arena = Arena(len(self._memory))
        self._slots: dict[bytes, Slot] = {}
        self._resident: Counter[str] = Counter()

    def find(self, key: bytes) -> Slot | None:
        """The slot that has this name now."""
        return self._slots.get(key)

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes of stored frames in memory, by codec."""
        return {codec: n_bytes for codec, n_bytes in self._resident.items() if n_bytes}

    def open(self, key: bytes, codec: str, n_bytes: int, put: Put | None = None) -> Slot | None:
        """A slot of this name, which nobody has; None where there is no room for it."""
        extents = self._room(n_bytes)
        if extents is None:
            return None
        self._slots[key] = slot = Slot(key, codec, n_bytes, extents, put)
        return slot

    def touch(self, slot: Slot) -> None:
        """It was used: the last to go."""
        self._slots[slot.key] = self._slots.pop(slot.key)

    def store(self, slot: Slot) -> None:
        """It can be read from now on."""
        slot.phase, slot.put = Phase.STORED, None
        self._resident[slot.codec] += slot.n_bytes

    def unname(self, key: bytes) -> Slot | None:
        """Nobody finds it any more. Its memory stays taken until `release`."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            slot.named = False
        return slot

    def release(self, slot: Slot) -> None:
        """Nobody touches it any more: overwrite it and let others have its memory. Raises
        VaultError for one that still has its name."""
        if slot.named:
            raise VaultError(f"slot of {slot.key.hex()}", "released by name", "report it")
        for part in self._parts(slot):
            for at in range(0, len(part), len(_ZEROS)):
                part[at : at + len(_ZEROS)] = _ZEROS[: len(part) - at]
        self.arena.give(slot.extents)
        if slot.phase is Phase.STORED:
            self._resident[slot.codec] -= slot.n_bytes

    def frame(self, slot: Slot) -> memoryview:
        """Its bytes; of one that is scattered, a copy."""
        parts = self._parts(slot)
        if len(parts) == 1:
            return parts[0][: slot.n_bytes]
        return memoryview(b"".join(parts))[: slot.n_bytes]

    def fill(self, slot: Slot, frame: memoryview) -> None:
        """Copy a frame of the slot's size there."""
        for part in self._parts(slot):
            n_bytes = min(len(part), len(frame))
            part[:n_bytes], frame = frame[:n_bytes], frame[n_bytes:]

    def whole(self, slot: Slot, checksum: int) -> bool:
        """Whether the frame of this checksum lies there, encoded as was told."""
        frame = self.frame(slot)
        try:
            return read_frame(frame).codec == slot.codec and told_checksum(frame) == checksum
        except CodecError:
            return False

    def _parts(self, slot: Slot) -> list[memoryview]:
        return [self._memory[at : at + n_bytes] for at, n_bytes in slot.extents]

    def _room(self, n_bytes: int) -> tuple[Extent, ...] | None:
        if self.arena.charge(n_bytes) > self.arena.n_bytes:
            return None
        while (extents := self.arena.take(n_bytes)) is None:
            idle = self._idle()
            if idle is None:
                return None
            self.unname(idle.key)
            self.release(idle)
        return extents

    def _idle(self) -> Slot | None:
        """The least recently used one that is on disk and that nobody reads."""
        if not self._extent:
            return None
        slots = self._slots.values()
        return next((s for s in slots if s.phase is Phase.STORED and not s.readers), None)
