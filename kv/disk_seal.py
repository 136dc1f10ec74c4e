"""What the file of a block holds: the block and a checksum, or the block encrypted.

Either is over the block's full name too, so that a file in another's place is damaged.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kv.disk_read import is_aligned
from kv.errors import DiskError

_CHECK_BYTES = 16
_NONCE_BYTES = 12
_TAG_BYTES = 16
_KEY_BYTES = 32
_KEY_ID_DIGITS = 16

# `Reader.scratch`.
Scratch = Callable[[int], memoryview]


class Seal(Protocol):
    """How blocks become files and back. Any thread may use one."""

    @property
    def overhead_bytes(self) -> int:
        """By how much a file is longer than its block."""

    def sealed(self, name: bytes, block: memoryview) -> Sequence[memoryview | bytes]:
        """The file of a block, in parts."""

    def room(self, into: memoryview, scratch: Scratch) -> Sequence[memoryview]:
        """What to read the file of a block of this length into (`Reader.read`); may begin with
        `into` itself."""

    def opened(self, name: bytes, room: Sequence[memoryview], into: memoryview) -> bool:
        """Whether `room` holds what `sealed` made for `name`; `into` holds the block then."""


class Checked:
    """The block as it is, and an xxh3 checksum: proof against damage, not against forgery."""

    overhead_bytes = _CHECK_BYTES

    def sealed(self, name: bytes, block: memoryview) -> Sequence[memoryview | bytes]:
        return block, _checksum(name, block)

    def room(self, into: memoryview, scratch: Scratch) -> Sequence[memoryview]:
        if is_aligned(into):
            return into, scratch(_CHECK_BYTES)
        return (scratch(len(into) + _CHECK_BYTES),)

    def opened(self, name: bytes, room: Sequence[memoryview], into: memoryview) -> bool:
        *in_place, last = room
        at = 0 if in_place else len(into)
        check = bytes(last[at : at + _CHECK_BYTES])
        if not in_place:
            into[:] = last[:at]
            last[:at] = bytes(at)  # no copy stays behind that an erasure does not know of
        return check == _checksum(name, into)


class Encrypted:
    """AES-256-GCM with a random 96-bit nonce a block, which is safe for 2**32 blocks under one key
    (NIST SP 800-38D, 8.3)."""

    overhead_bytes = _NONCE_BYTES + _TAG_BYTES

    def __init__(self, key: bytes) -> None:
        """`key` is `_KEY_BYTES` long (`read_key`)."""
        self._cipher = AESGCM(key)
        digest = hashlib.sha256(b"disk tier key id\0" + key).hexdigest()
        self.key_id = digest[:_KEY_ID_DIGITS]

    def sealed(self, name: bytes, block: memoryview) -> Sequence[memoryview | bytes]:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce, self._cipher.encrypt(nonce, block, name)

    def room(self, into: memoryview, scratch: Scratch) -> Sequence[memoryview]:
        return (scratch(len(into) + self.overhead_bytes),)

    def opened(self, name: bytes, room: Sequence[memoryview], into: memoryview) -> bool:
        file = room[0][: len(into) + self.overhead_bytes]
        try:
            self._cipher.decrypt_into(file[:_NONCE_BYTES], file[_NONCE_BYTES:], name, into)
        except InvalidTag:
            return False
        return True


def read_key(path: Path) -> bytes:
    """The 32 bytes of a key file; raises `DiskError` unless it is this user's alone (0600)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found, key = os.fstat(file), os.read(file, _KEY_BYTES + 1)
        finally:
            os.close(file)
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error
    user, mode = os.geteuid(), stat.S_IMODE(found.st_mode)
    if found.st_uid != user or mode & 0o077:
        raise _refused(path, f"user {found.st_uid}, mode {mode:o}; wanted {user} and 600")
    if len(key) != _KEY_BYTES:
        raise _refused(path, f"{found.st_size} bytes, not {_KEY_BYTES}")
    return key


def _refused(path: Path, numbers: str) -> DiskError:
    make = f"(umask 077; head -c {_KEY_BYTES} /dev/urandom > FILE)"
    return DiskError(f"tiers.disk.key_file {path}", numbers, f"make one of yours: {make}")


def _checksum(name: bytes, block: memoryview) -> bytes:
    check = xxhash.xxh3_128(name)
    check.update(block)
    return check.digest()
