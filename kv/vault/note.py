"""What a shard writes beside each block on disk, so that its books can be made anew from there."""

from math import inf

import msgspec

from kv.errors import VaultError
from kv.vault.orders import Put


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One block's entry in the books. `expires_at_s` is in seconds since 1970, which a restart does
    not change; None for a block that never expires.
    """

    tenant: str
    parent: bytes | None
    seconds_saved: float
    expires_at_s: float | None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Note)


def packed(put: Put, wall_s: float) -> bytes:
    """The note of a block that is stored at `wall_s`, in seconds since 1970."""
    expires_at_s = None if put.ttl_s == inf else wall_s + put.ttl_s
    return _ENCODER.encode(Note(put.tenant, put.parent, put.seconds_saved, expires_at_s))


def unpacked(key: bytes, note: bytes, n_bytes: int, writer: str, wall_s: float) -> Put | None:
    """The put that stores a block of `n_bytes` again at `wall_s`, for the rest of its time to live;
    None where that is over. Raises VaultError for a note that `packed` did not write.
    """
    found = _decoded(key, note)
    ttl_s = inf if found.expires_at_s is None else found.expires_at_s - wall_s
    if ttl_s <= 0.0:
        return None
    return Put(key, found.parent, found.tenant, writer, n_bytes, found.seconds_saved, ttl_s)


def tenant_of(key: bytes, note: bytes) -> str:
    """Whose block it is. Raises VaultError for a note that `packed` did not write."""
    return _decoded(key, note).tenant


def _decoded(key: bytes, note: bytes) -> Note:
    try:
        return _DECODER.decode(note)
    except msgspec.MsgspecError as error:
        raise VaultError(
            f"note of {key.hex()}", f"{len(note)} bytes: {error}", "drop the block"
        ) from error
