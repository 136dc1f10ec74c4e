"""How a block lies in a segment file: a frame of header, key, note and payload.

A segment begins with MAGIC and a mark of random bytes, and each header with that mark: what looks
like a frame in the middle of a payload is none, since nobody can know the mark. The header's own
checksum covers key and note, so that an index is read without payloads; each payload has its own.
"""

import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

MAGIC = b"bkvseg1\n"
MARK_BYTES = 8
PREFIX_BYTES = len(MAGIC) + MARK_BYTES

# Mark, state, bytes of key, note and payload, payload's checksum, checksum of all but the state.
_HEADER = struct.Struct("<8sBHIQQQ")
HEADER_BYTES = _HEADER.size
# Where the state lies: one byte, overwritten in place when the block goes.
STATE_OFFSET = MARK_BYTES
LIVE, DEAD = 1, 0
MAX_KEY_BYTES = 0xFFFF
MAX_NOTE_BYTES = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame's header, with its key and note."""

    key: bytes
    note: bytes
    payload_bytes: int
    payload_sum: int
    live: bool

    @property
    def payload_offset(self) -> int:
        """Bytes from the frame's start to its payload."""
        return HEADER_BYTES + len(self.key) + len(self.note)

    @property
    def n_bytes(self) -> int:
        """The whole frame."""
        return self.payload_offset + self.payload_bytes


def packed(mark: bytes, key: bytes, note: bytes, payload: bytes | memoryview) -> bytes:
    """The frame of a live block, up to its payload, which follows it in the file."""
    payload_sum = xxh3_64_intdigest(payload)
    sizes = (len(key), len(note), len(payload))
    head_sum = _head_sum(mark, sizes, payload_sum, key + note)
    return _HEADER.pack(mark, LIVE, *sizes, payload_sum, head_sum) + key + note


def sizes(mark: bytes, header: bytes) -> tuple[int, int, int] | None:
    """Bytes of key, note and payload as a header has them, unchecked; None for no header."""
    if len(header) < HEADER_BYTES or not header.startswith(mark):
        return None
    _, _, key_bytes, note_bytes, payload_bytes, _, _ = _HEADER.unpack_from(header)
    return key_bytes, note_bytes, payload_bytes


def unpacked(mark: bytes, head: bytes) -> Frame | None:
    """The frame that `head`, a header with its key and note, begins; None if it is damaged."""
    found = sizes(mark, head)
    if found is None:
        return None
    key_bytes, note_bytes, payload_bytes = found
    _, state, _, _, _, payload_sum, head_sum = _HEADER.unpack_from(head)
    named = head[HEADER_BYTES:]
    if len(named) != key_bytes + note_bytes:
        return None
    if head_sum != _head_sum(mark, found, payload_sum, named):
        return None
    return Frame(named[:key_bytes], named[key_bytes:], payload_bytes, payload_sum, state == LIVE)


def _head_sum(mark: bytes, sizes: tuple[int, int, int], payload_sum: int, named: bytes) -> int:
    return xxh3_64_intdigest(_HEADER.pack(mark, LIVE, *sizes, payload_sum, 0) + named)
