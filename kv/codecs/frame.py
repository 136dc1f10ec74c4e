"""The frame around an encoded page: 64 bytes that say what it is and prove that it is whole.

    0  magic "BEKV"
    4  version, uint16: of this form and of every codec's payload, tq4's signs among them
    8  codec's name, 8 bytes, zeros behind it
   16  fingerprint of the page's shape, dtype and layout
   32  payload's length in bytes, uint64
   40  zeros
   56  xxh3_64 of all that comes before and of the payload, uint64

Integers are little-endian. The checksum finds accidents; against forgery there are the channel's
keys. It is verified before anything is decoded, and what fails in any way gives no data.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from xxhash import xxh3_64

from kv.codecs.codec import Bytes, Codec, Writable
from kv.codecs.page import PageShape
from kv.errors import CodecError

MAGIC = b"BEKV"
VERSION = 1
_HEADER = struct.Struct("<4sHxx8s16sQ16x")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Frame:
    """What a frame's header says, and its payload."""

    codec: str
    fingerprint: bytes
    payload: memoryview


def frame_bytes(codec: Codec, shape: PageShape) -> int:
    """Bytes of a page's frame. Raises CodecError for a shape that `codec` does not take."""
    return HEADER_BYTES + codec.encoded_bytes(shape)


def encode_frame(codec: Codec, page: Bytes, shape: PageShape, frame: Writable) -> None:
    """Fill `frame`, of `frame_bytes` bytes. Raises CodecError for a page or frame of another
    length and for what `codec` refuses; `frame` is then not one that can be decoded.
    """
    payload_bytes = codec.encoded_bytes(shape)
    source, target = memoryview(page).cast("B"), memoryview(frame).cast("B")
    _check_length(f"{codec.name} page of {shape}", len(source), shape.page_bytes)
    _check_length(f"{codec.name} frame of {shape}", len(target), HEADER_BYTES + payload_bytes)
    # A refused page leaves no header of an older frame.
    target[:HEADER_BYTES] = bytes(HEADER_BYTES)
    payload = target[HEADER_BYTES:]
    codec.encode(source, shape, payload)
    seal(codec.name, shape.fingerprint, target)


def seal(codec: str, fingerprint: bytes, frame: Writable) -> None:
    """Write the header in front of a payload that is there already. `fingerprint`, of 16 bytes,
    says what the payload is; `encode_frame` has that of a page's shape there."""
    target = memoryview(frame).cast("B")
    payload = target[HEADER_BYTES:]
    header = _HEADER.pack(MAGIC, VERSION, codec.encode(), fingerprint, len(payload))
    target[:HEADER_BYTES] = header + _CHECKSUM.pack(_checksum(header, payload))


def read_frame(frame: Bytes) -> Frame:
    """The frame in these bytes, once its checksum is right. Raises CodecError for anything else."""
    found, told = _opened(frame)
    header = memoryview(frame).cast("B")[: _HEADER.size]
    if (right := _checksum(header, found.payload)) != told:
        _refuse("frame", f"checksum {right:016x}, its header says {told:016x}")
    return found


def open_verified(frame: Bytes) -> Frame:
    """The frame in bytes whose checksum somebody has found right. Raises CodecError for another
    form, version or length."""
    return _opened(frame)[0]


def _opened(frame: Bytes) -> tuple[Frame, int]:
    """A frame, and the checksum that its header says."""
    whole = memoryview(frame).cast("B").toreadonly()
    if len(whole) < HEADER_BYTES:
        _refuse("frame", f"{len(whole)} bytes, {HEADER_BYTES} are its header")
    header, payload = whole[: _HEADER.size], whole[HEADER_BYTES:]
    magic, version, name, fingerprint, payload_bytes = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        _refuse("frame", f"magic {magic!r} version {version}, not {MAGIC!r} version {VERSION}")
    if payload_bytes != len(payload):
        _refuse("frame", f"{len(payload)} bytes of payload, its header says {payload_bytes}")
    (told,) = _CHECKSUM.unpack(whole[_HEADER.size : HEADER_BYTES])
    return Frame(name.rstrip(b"\0").decode("ascii", "replace"), fingerprint, payload), told


def told_checksum(frame: Bytes) -> int:
    """The checksum that a frame of HEADER_BYTES or more says it has; whether it is so, only
    `read_frame` knows. Two frames with one checksum hold the same bytes.
    """
    told: int = _CHECKSUM.unpack_from(frame, _HEADER.size)[0]
    return told


def decode_frame(
    frame: Bytes, shape: PageShape, accepted: Mapping[str, Codec], page: Writable
) -> str:
    """Fill `page`, of `shape.page_bytes` bytes, and return the codec's name.

    `accepted` are the codecs that the reader opted into, by name. Raises CodecError, with `page` as
    it was, for a frame that is damaged, of another shape or of a codec that is not accepted.
    """
    target = memoryview(page).cast("B")
    _check_length(f"page of {shape}", len(target), shape.page_bytes)
    found = read_frame(frame)
    if found.fingerprint != shape.fingerprint:
        _refuse(f"{found.codec} frame", f"fingerprint {found.fingerprint.hex()} is not of {shape}")
    if found.codec not in accepted:
        names = ", ".join(accepted) or "nothing"
        raise CodecError(f"{found.codec} frame", f"{names} accepted", "compute the block anew")
    codec = accepted[found.codec]
    _check_length(f"{codec.name} payload", len(found.payload), codec.encoded_bytes(shape))
    codec.decode(found.payload, shape, target)
    return codec.name


def _checksum(header: Bytes, payload: Bytes) -> int:
    state = xxh3_64(header)
    state.update(payload)
    return state.intdigest()


def _check_length(subject: str, given_bytes: int, wanted_bytes: int) -> None:
    if given_bytes != wanted_bytes:
        raise CodecError(
            subject, f"{given_bytes} bytes, {wanted_bytes} wanted", "give a buffer of that size"
        )


def _refuse(subject: str, numbers: str) -> NoReturn:
    raise CodecError(subject, numbers, "treat the block as a miss and compute it anew")
