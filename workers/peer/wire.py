"""What two replicas say to each other about blocks; the blocks themselves are read over NIXL.

A reader asks what is there, or will be (`Find`), and for a loan of what it is about to read
(`Get`). Rows that are lent stay as they are until the reader says `Done` or the loan's time is
over, whichever is first. Keys are the tiers' own: vLLM's salted hashes, with the group.
"""

import msgspec

from workers.errors import WireError

PEER_VERSION = 2
# Keys of one question: a prompt of 32,768 tokens in blocks of 32.
MOST_KEYS = 1024
MOST_MESSAGE_BYTES = 1 << 20


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first message of a connection. `fingerprint` names all that a block's bytes depend on
    besides its key."""

    version: int
    fingerprint: str


class Find(msgspec.Struct, frozen=True, tag="find"):
    """Which of these blocks are in the host tier? `work` is the id of the request that computes
    them there; empty if none does."""

    number: int
    keys: tuple[bytes, ...]
    work: str = ""


class Get(msgspec.Struct, frozen=True, tag="get"):
    """Lend these blocks for `lease_s` seconds from when this comes."""

    number: int
    keys: tuple[bytes, ...]
    lease_s: float


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The blocks that were lent under this number have been read."""

    number: int


Question = Hello | Find | Get | Done


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """`rows` of `row_bytes` each, from the address `base` on, of the NIXL agent `metadata`."""

    metadata: bytes
    base: int
    row_bytes: int
    rows: int


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    """This connection will not be answered."""

    complaint: str


class Found(msgspec.Struct, frozen=True, tag="found"):
    """For each key of `Find`: whether it is there. `ended`: its work has, and brings no more."""

    number: int
    here: tuple[bool, ...]
    ended: bool = False


class Place(msgspec.Struct, frozen=True):
    """Where a block lies, and the xxh3_64 of its row."""

    row: int
    checksum: int


class Lent(msgspec.Struct, frozen=True, tag="lent"):
    """For each key of `Get`: where it is; None for one that is not lent."""

    number: int
    places: tuple[Place | None, ...]


Reply = Welcome | Denied | Found | Lent

_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Question)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Question | Reply) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_question(frame: bytes, reader: str) -> Question:
    """A reader's message. Raises WireError for anything else."""
    try:
        question: Question = _questions.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(reader, str(error)) from error
    return question


def decode_reply(frame: bytes, lender: str) -> Reply:
    """A lender's message. Raises WireError for anything else."""
    try:
        reply: Reply = _replies.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(lender, str(error)) from error
    return reply
