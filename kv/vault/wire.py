"""What a vault's clients and a shard say to each other: control only, the bytes go over NIXL.

A client says Hello and learns where the shard's memory lies. It puts a block in three steps: Put
asks for room, the client writes the frames there, Written says that they are in. It gets blocks by
Get, which lends them for a time, reads them out, and gives them back with Done. Has asks which are
there, and holds nothing. All messages are msgpack in declared shapes; nothing is ever unpickled.

The frame's checksum travels with each message about a block, since it names the bytes: whoever
reads memory that meanwhile holds another whole frame sees that it is not the one that was meant.
"""

from enum import StrEnum
from math import isfinite
from typing import Annotated

import msgspec
from msgspec import Meta

from kv.codecs.frame import HEADER_BYTES
from kv.errors import VaultMessageError
from kv.vault.arena import Extent
from kv.vault.orders import Outcome

# Bumped whenever a message changes shape, other than Hello and Denied, which never do.
VAULT_VERSION = 3
# Of one message; a Get of that many keys is some 40 kB.
MOST_BLOCKS = 1024
MOST_MESSAGE_BYTES = 1 << 20

Key = Annotated[bytes, Meta(min_length=1, max_length=64)]
Tag = Annotated[str, Meta(max_length=64)]
Number = Annotated[int, Meta(ge=0)]
Checksum = Annotated[int, Meta(ge=0)]


class Reason(StrEnum):
    """Why a shard did not store a block, beside those that its ledger gives (`Refusal`)."""

    NO_MEMORY = "no_memory"  # what is free is held back for writers that may still write
    FORGOTTEN = "forgotten"  # its tenant was erased just now
    MALFORMED = "malformed"  # sizes or parents that no block has
    NOT_WRITTEN = "not_written"  # the client gave up
    LATE = "late"  # the grant had ended
    DAMAGED = "damaged"  # what lies there is not the frame that was told
    DISK = "disk"  # the disk extent did not take it


# ------------------------------------------------------------------ client to shard


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Open a connection. `fingerprint` is of all that blocks' bytes depend on (`kv.fingerprint`).

    The one message that may grow fields without a new version, so that another one can be refused.
    """

    version: int
    client: str
    fingerprint: str


class Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One block that a client would store: `n_bytes` of frame, `ttl_s` None for ever."""

    key: Key
    parent: Key | None
    n_bytes: Annotated[int, Meta(ge=HEADER_BYTES, le=1 << 40)]
    seconds_saved: Annotated[float, Meta(ge=0.0)]
    ttl_s: Annotated[float, Meta(gt=0.0)] | None = None


class Put(msgspec.Struct, frozen=True, tag="put", forbid_unknown_fields=True):
    """Ask for room for blocks of one tenant, encoded by one codec."""

    number: Number
    tenant: Tag
    codec: Annotated[str, Meta(max_length=8)]
    offers: Annotated[tuple[Offer, ...], Meta(min_length=1, max_length=MOST_BLOCKS)]


class Written(msgspec.Struct, frozen=True, tag="written", forbid_unknown_fields=True):
    """The client writes nothing more for the Put of this number. `checksums` are those of the
    frames that it was granted, in their order, and None for those that it did not write."""

    number: Number
    checksums: tuple[Checksum | None, ...]


class Get(msgspec.Struct, frozen=True, tag="get", forbid_unknown_fields=True):
    """Lend me the leading ones of these blocks. I may take `wanted_s` to read them."""

    number: Number
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_BLOCKS)]
    wanted_s: Annotated[float, Meta(ge=0)] = 0.0


class Has(msgspec.Struct, frozen=True, tag="has", forbid_unknown_fields=True):
    """Which of these blocks are there? Counts as no use of them."""

    number: Number
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_BLOCKS)]


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """The Get of this number reads nothing more. `damaged` are places of its answer whose bytes
    were not what was told."""

    number: Number
    damaged: tuple[Number, ...] = ()


class Forget(msgspec.Struct, frozen=True, tag="forget", forbid_unknown_fields=True):
    """Erase all blocks of these tenants (tags of salts, `kv.salt`)."""

    number: Number
    tags: Annotated[tuple[Tag, ...], Meta(min_length=1, max_length=MOST_BLOCKS)]


class Stat(msgspec.Struct, frozen=True, tag="stat", forbid_unknown_fields=True):
    """What is stored?"""

    number: Number


Question = Hello | Put | Written | Get | Has | Done | Forget | Stat

# ------------------------------------------------------------------ shard to client


class Welcome(msgspec.Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """To a Hello. `metadata` is the shard's NIXL agent, `base` the address of its memory there."""

    shard: str
    metadata: bytes
    base: int
    n_bytes: int


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    """Nothing is stored for or lent to this connection, and why."""

    complaint: str


class Verdict(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What becomes of one offer: `extents` are where its frame is to be written, in order."""

    outcome: Outcome
    reason: str = ""
    extents: tuple[Extent, ...] = ()


class Granted(msgspec.Struct, frozen=True, tag="granted", forbid_unknown_fields=True):
    """To a Put: a verdict for each offer, and how long the grants last, from its arrival."""

    number: Number
    verdicts: tuple[Verdict, ...]
    write_s: float


class Stored(msgspec.Struct, frozen=True, tag="stored", forbid_unknown_fields=True):
    """To a Written: a verdict for each granted offer, STORED or REFUSED."""

    number: Number
    verdicts: tuple[Verdict, ...]


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where one lent frame lies, and its checksum."""

    extents: tuple[Extent, ...]
    checksum: Checksum


class Lent(msgspec.Struct, frozen=True, tag="lent", forbid_unknown_fields=True):
    """To a Get: the leading blocks, for `lease_s` from when the Get was sent."""

    number: Number
    places: tuple[Place, ...]
    lease_s: float


class Held(msgspec.Struct, frozen=True, tag="held", forbid_unknown_fields=True):
    """To a Has: for each of its blocks whether it could be lent now."""

    number: Number
    held: tuple[bool, ...]


class Forgotten(msgspec.Struct, frozen=True, tag="forgotten", forbid_unknown_fields=True):
    """To a Forget, once it is on the disk too (`erased` is False where that failed). Nobody finds
    these blocks any more; `in_use_bytes` are overwritten when their readers or writers end."""

    number: Number
    blocks: int
    in_use_bytes: int
    erased: bool


class Stats(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """To a Stat. `quarantined_bytes` wait for writers that may still write there."""

    number: Number
    blocks: int
    stored_bytes: int
    free_bytes: int
    quarantined_bytes: int
    leases: int
    resident_bytes: dict[str, int]  # of frames in memory, by codec


def by_codec(stats: Stats) -> dict[str, int]:
    """Bytes of all frames by codec; of those that lie on disk alone, by `on_disk`: a shard knows
    their codec once it reads them."""
    cold_bytes = stats.stored_bytes - sum(stats.resident_bytes.values())
    return {**stats.resident_bytes, **({"on_disk": cold_bytes} if cold_bytes > 0 else {})}


class Beat(msgspec.Struct, frozen=True, tag="beat", forbid_unknown_fields=True):
    """Sent to see whether the connection stands; to be ignored."""


Reply = Welcome | Denied | Granted | Stored | Lent | Held | Forgotten | Stats | Beat

_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Question)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Question | Reply) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_question(frame: bytes, peer: str) -> Question:
    """A frame from a client; raises VaultMessageError for anything else."""
    try:
        question: Question = _questions.decode(frame)
    except msgspec.MsgspecError as error:
        raise _unreadable(peer, frame, str(error)) from error
    if isinstance(question, Put):
        _check_finite(question, peer, frame)
    return question


def decode_reply(frame: bytes, peer: str) -> Reply:
    """A frame from a shard; raises VaultMessageError for anything else."""
    try:
        reply: Reply = _replies.decode(frame)
    except msgspec.MsgspecError as error:
        raise _unreadable(peer, frame, str(error)) from error
    return reply


def _check_finite(put: Put, peer: str, frame: bytes) -> None:
    # msgpack has infinities and NaNs, which the bounds let through.
    for offer in put.offers:
        if not isfinite(offer.seconds_saved) or not isfinite(offer.ttl_s or 0.0):
            raise _unreadable(peer, frame, f"{offer.seconds_saved} s saved, kept {offer.ttl_s} s")


def _unreadable(peer: str, frame: bytes, complaint: str) -> VaultMessageError:
    return VaultMessageError(peer, f"{len(frame)} bytes: {complaint}", "run one version everywhere")
