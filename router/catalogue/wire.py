"""What an ingress and a catalogue say to each other.

Replicas go by their epoch here: a restarted engine is another one, and two ingresses may know one
engine by different names.
"""

from typing import Protocol

import msgspec

from kv.catalogue import Tier
from router.limits import Limits, Standing
from workers.errors import WireError

# Bumped whenever a message changes shape; a catalogue of another version is not asked.
CATALOGUE_VERSION = 3


class Seat(msgspec.Struct, frozen=True):
    """Where a catalogue process can be reached; constant for its life."""

    name: str
    epoch: str
    address: str
    node: str
    version: int = CATALOGUE_VERSION


class SeatRecord(msgspec.Struct, frozen=True):
    """A catalogue's record in the directory; `beat` grows with each renewal."""

    seat: Seat
    beat: int


def seat_prefix(cluster: str) -> str:
    """The key prefix of all catalogues of one cluster."""
    return f"catalogues/{cluster}/"


class Taken(msgspec.Struct, frozen=True):
    """What was sent to a replica and is not answered yet, so that no report tells of it."""

    requests: int = 0
    prefills: int = 0
    prefill_tokens: int = 0

    def plus(self, other: "Taken") -> "Taken":
        """Both, added up."""
        return Taken(
            self.requests + other.requests,
            self.prefills + other.prefills,
            self.prefill_tokens + other.prefill_tokens,
        )


class Found(msgspec.Struct, frozen=True):
    """What is known of a prompt's blocks, by epoch.

    `depths` counts the leading blocks that a replica's paged KV has, or is about to have; `taken`
    is what ingresses have sent it. `tiers` counts the leading blocks that each tier behind has,
    where they are more.
    """

    depths: dict[str, int] = {}
    taken: dict[str, Taken] = {}
    tiers: dict[str, dict[Tier, int]] = {}


# ------------------------------------------------------------------ ingress to catalogue


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Open or keep open a connection; repeated, since what a silent ingress expects is dropped."""

    ingress: str


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Who has these blocks? `keys` are concatenated."""

    number: int
    keys: bytes


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """A request was sent to a replica, which is computing `prefill_tokens` and will have `keys`."""

    name: str
    epoch: str
    prefill_tokens: int
    keys: bytes = b""


class Met(msgspec.Struct, frozen=True, tag="met"):
    """What was expected under this name has come, or never will."""

    name: str


class Enter(msgspec.Struct, frozen=True, tag="enter"):
    """May one more request of a limited tenant enter? If so it holds a slot until `Leave`."""

    number: int
    tenant: str
    limits: Limits
    request_id: str


class Held(msgspec.Struct, frozen=True, tag="held"):
    """A request that entered before this catalogue was here holds its slot already."""

    tenant: str
    limits: Limits
    request_id: str


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """A request has ended and used so many tokens; without a slot it changes nothing."""

    tenant: str
    limits: Limits
    request_id: str
    tokens: int


Question = Hello | Look | Expect | Met | Enter | Held | Leave

# ------------------------------------------------------------------ catalogue to ingress


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Sent four times a second: blocks that it knows of each replica, by epoch; how old the oldest
    change of the last quarter to half minute was when it took it in; and how likely a block that is
    displaced now will be asked for (`kv.regret`)."""

    pid: int = 0
    blocks: dict[str, int] = {}
    lag_s: float = 0.0
    regret: float = 0.0


class Tell(msgspec.Struct, frozen=True, tag="tell"):
    """To an ingress that is not known, or was dropped: say what it expects and what it holds."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """To the `Look` of this number."""

    number: int
    found: Found


class Stands(msgspec.Struct, frozen=True, tag="stands"):
    """To the `Enter` of this number."""

    number: int
    standing: Standing


Reply = Beat | Tell | Answer | Stands

_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Question)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Question | Reply) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_question(frame: bytes, peer: str) -> Question:
    """A frame from an ingress; raises `WireError` for anything else."""
    try:
        question: Question = _questions.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(peer, str(error)) from error
    return question


def decode_reply(frame: bytes, peer: str) -> Reply:
    """A frame from a catalogue; raises `WireError` for anything else."""
    try:
        reply: Reply = _replies.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(peer, str(error)) from error
    return reply


class Line(Protocol):
    """An ingress's connection to the catalogue: the seam between the two processes.

    `router.catalogue.client.CatalogueLine` speaks it over ZMQ; the simulated worlds have one on
    the event loop's clock.
    """

    @property
    def up(self) -> bool:
        """Whether the catalogue answers."""
        ...

    @property
    def beat(self) -> Beat:
        """What it said last."""
        ...

    async def look(self, keys: bytes) -> Found | None:
        """What is known of these blocks; None when no catalogue answers in time."""
        ...

    def expect(self, expect: Expect) -> None:
        """Tell of a request that was sent; never blocks."""
        ...

    def met(self, name: str) -> None:
        """Take that back."""
        ...
