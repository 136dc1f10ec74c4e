"""What an ingress and a replica say to each other.

This module, the records by which it finds them (`workers.directory`) and the errors are all that
the router knows of the workers. Tokens, logprobs and block keys travel here; prompts as text do not
exist on this side of the ingress. vLLM's own structures cross as opaque bytes (`body`, `extras`),
so that neither the router nor the simulator imports vLLM.
"""

from enum import StrEnum
from typing import Any, Protocol

import msgspec

from kv.catalogue import Tier
from kv.codecs.codec import CodecName
from kv.plan import Hints
from workers.errors import WireError

# Bumped whenever a message changes shape; a replica of another version is not routable.
WIRE_VERSION = 9


# vLLM's kv_transfer_params: where a finished prefill's blocks lie. Opaque to the router.
Handoff = dict[str, Any]
# Set in a handoff whose KV was computed before its tenant was forgotten: a decode replica must not
# let anybody else find it. The connector reads other keys only.
FORGOTTEN = "forgotten"


class Role(StrEnum):
    """The pool that a replica belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


class Replica(msgspec.Struct, frozen=True):
    """Who a replica is, as it announces itself; constant for the life of one engine.

    `hardware` says what its engine runs on and how: those of one model and hardware are equally
    fast; empty where nobody is like it. `epoch` differs between two engines that carried the same
    name: blocks, curves and NIXL state of an earlier epoch are void.
    """

    name: str
    role: Role
    epoch: str
    address: str
    node: str
    pid: int
    model: str
    block_tokens: int
    kv_bytes_per_token: int
    kv_blocks: int
    max_num_seqs: int
    # (new tokens, cached tokens, seconds) of the prefills timed at start.
    prefill_samples: tuple[tuple[int, int, float], ...]
    step_s: float
    hardware: str = ""
    # Where other replicas are lent its host tier's blocks; empty where they are not.
    peer_address: str = ""
    # Of one prompt, how much its host tier takes in from what lies behind it.
    room_tokens: int = 0
    # Host and port that answer Prometheus.
    metrics_address: str = ""
    # Its node has an RDMA device.
    rdma: bool = False
    wire_version: int = WIRE_VERSION


# ------------------------------------------------------------------ ingress to replica


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Open or keep open a connection; the replica answers the first with `Welcome`.

    Repeated every second: a replica aborts the requests of an ingress that falls silent. With
    `follow` its blocks are told too.
    """

    ingress: str
    follow: bool = False


class Keep(msgspec.Struct, frozen=True):
    """How a request lets its blocks be stored: by a codec that loses precision (None: exactly), and
    in a vault for `ttl_s` (None: for as long as any). Where it `yields`, they take nobody's place
    in the tiers, and are the first to go from there and from the paged KV."""

    codec: CodecName | None = None
    ttl_s: float | None = None
    yields: bool = False


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run one request, or the prefill of one.

    `tokens` is the prompt as packed uint32 (see `kv.block.pack_tokens`); `body` is vLLM's
    EngineCoreRequest without it. With `role` prefill the engine computes the prompt, keeps the
    KV under a lease and answers with a handoff; with `handoff` it first takes that KV.
    `answered` are tokens of the answer that another engine gave before it was lost, packed: the
    engine goes on behind them (`workers.carry`). `hints` say what it may take from its tiers;
    without any it takes what they have. Behind a handoff it takes nothing from them. A prefill
    that `lends` is the head of a split: its KV stays in the engine's host tier, from where the
    decode replica that runs a request of the same id reads it, and its answer has no handoff. With
    a `patience_s` others go before it for so many seconds from its arrival here; without one it is
    as urgent as any.
    """

    request_id: str
    role: Role
    tokens: bytes
    body: bytes
    handoff: Handoff | None = None
    answered: bytes = b""
    hints: Hints | None = None
    keep: Keep | None = None
    lends: bool = False
    patience_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests and free what they hold."""

    request_ids: list[str]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Sent to a decode replica: give back the prefill behind `handoff`, nobody will decode it."""

    request_id: str
    handoff: Handoff


class Resync(msgspec.Struct, frozen=True, tag="resync"):
    """Send a snapshot of the blocks again: a `Blocks` message was missed."""


class Reset(msgspec.Struct, frozen=True, tag="reset"):
    """Forget every cached block (an operator's order)."""


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Erase every block whose salt has one of these tags (`kv.salt`); answered by `Forgotten`.

    A request that reads such blocks goes on; nobody else finds what it adds.
    """

    order_id: str
    tags: tuple[str, ...]


Request = Hello | Submit | Abort | Release | Resync | Reset | Forget

# ------------------------------------------------------------------ replica to ingress


class Sources(msgspec.Struct, frozen=True):
    """Where the tokens of a prompt came from on one engine; they add up to `prompt_tokens`.

    `received_tokens` are those of a handoff. A request has them or those of tiers, never both.
    """

    prompt_tokens: int
    computed_tokens: int
    device_tokens: int
    received_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0
    peer_tokens: int = 0
    vault_tokens: int = 0

    def by_source(self) -> dict[str, int]:
        """Tokens by where they came from, without what gave none."""
        counted = {
            name.removesuffix("_tokens"): getattr(self, name)
            for name in self.__struct_fields__
            if name != "prompt_tokens"
        }
        return {source: tokens for source, tokens in counted.items() if tokens}


class Spent(msgspec.Struct, frozen=True):
    """Seconds of one request on one engine, up to its first token or its handoff.

    `queued_s` from its arrival at the replica until the engine first took it up; `loading_s` from
    there until what it fetched from tiers, or was handed off, was in: `loaded_bytes` of paged KV;
    `computing_s` from there until its first token, or its handoff, left the engine. While it loaded
    and computed, the engine computed `others_tokens` of other prompts too; `beside` it others
    loaded. The blocks of a `lossy` request may have been stored by a lossy codec.
    """

    queued_s: float
    loading_s: float
    computing_s: float
    loaded_bytes: int = 0
    others_tokens: int = 0
    lossy: bool = False
    beside: bool = False


class Delta(msgspec.Struct, frozen=True):
    """What one engine step adds to one request.

    `finish_reason` is vLLM's word (stop, length, abort, error, repetition) or None while the
    request goes on. `extras` is vLLM's EngineCoreOutput when it says more than tokens do. The first
    delta has `sources` and `spent`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    sources: Sources | None = None
    handoff: Handoff | None = None
    extras: list[bytes] | None = None
    error: str | None = None
    spent: Spent | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Every delta of one engine step that belongs to this ingress."""

    deltas: list[Delta]


class Totals(msgspec.Struct, frozen=True):
    """Counters since this engine started; they only grow."""

    prompt_tokens_computed: int = 0
    prompt_tokens_device: int = 0
    prompt_tokens_received: int = 0
    generated_tokens: int = 0
    transfers: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    failed_transfers: int = 0
    expired_leases: int = 0
    # Prompt tokens that a tier brought, and bytes between tiers: what the host tier took from the
    # engine and gave to it, what those behind it took from the host tier and gave it.
    prompt_tokens_host: int = 0
    prompt_tokens_disk: int = 0
    prompt_tokens_peer: int = 0
    prompt_tokens_vault: int = 0
    host_stored_bytes: int = 0
    host_loaded_bytes: int = 0
    disk_stored_bytes: int = 0
    disk_loaded_bytes: int = 0
    vault_stored_bytes: int = 0
    vault_loaded_bytes: int = 0
    peer_loaded_bytes: int = 0
    failed_loads: int = 0
    # Blocks that its paged KV gave up.
    evicted_blocks: int = 0


class FetchLoad(msgspec.Struct, frozen=True):
    """Fetching n bytes into the paged KV takes `latency_s + n * per_byte_s`, by `samples` fetches;
    a guess without any. `seen` are bytes and seconds of the last few."""

    latency_s: float
    per_byte_s: float
    samples: int = 0
    seen: tuple[tuple[int, float], ...] = ()


class LossyLoad(FetchLoad, frozen=True):
    """The same of blocks that a lossy codec made smaller, to this `share`; bytes are those of
    pages."""

    share: float = 1.0


class TierLoad(msgspec.Struct, frozen=True):
    """What a replica says of one tier behind its paged KV.

    It holds `blocks`; `unnamed` ones among them are in no `Blocks` message, since the replica does
    not know yet what prompts they belong to. What fetching from there takes is told as in
    `FetchLoad`. `lossy` says the same of requests whose blocks a lossy codec stores there; None
    where all are stored as they are.
    """

    blocks: int
    unnamed: int
    latency_s: float
    per_byte_s: float
    samples: int = 0
    lossy: LossyLoad | None = None
    seen: tuple[tuple[int, float], ...] = ()


class Yielding(msgspec.Struct, frozen=True):
    """The part of a load that gives way to what comes (`Submit.patience_s`); it holds a share of
    `kv_usage` of the paged KV."""

    waiting: int = 0
    running: int = 0
    pending_prefills: int = 0
    pending_prefill_tokens: int = 0
    kv_usage: float = 0.0


class Load(msgspec.Struct, frozen=True, tag="load"):
    """How busy a replica is; sent when it changes and at least once a second.

    `pending_prefills` requests have `pending_prefill_tokens` prompt tokens still to compute.
    Counts are of all requests; `yielding` says how many of them give way.
    `leased` counts finished prefills whose blocks wait for a decode replica to read them. A
    `draining` replica finishes what it has and gets nothing new. `peer` is what blocks cost that
    another replica lends; None while none were fetched.
    """

    waiting: int = 0
    running: int = 0
    pending_prefills: int = 0
    pending_prefill_tokens: int = 0
    leased: int = 0
    kv_usage: float = 0.0
    totals: Totals = Totals()
    lanes: tuple[str, ...] = ()
    draining: bool = False
    tiers: dict[Tier, TierLoad] = {}
    yielding: Yielding = Yielding()
    peer: FetchLoad | None = None


class Blocks(msgspec.Struct, frozen=True, tag="blocks"):
    """A change of what one tier of an engine holds, in catalogue keys, stripped of tokens.

    Keys are 16 bytes each, concatenated. `sequence` grows by one a message, of whichever tier; a
    receiver that misses one sends `Resync`. A `snapshot` voids what was said of every tier before;
    what does not fit into it follows. `at_s` is when the engine reported it, in seconds since 1970
    of its node's clock; 0 if that does not matter.
    """

    sequence: int
    stored: bytes = b""
    removed: bytes = b""
    snapshot: bool = False
    at_s: float = 0.0
    tier: Tier = Tier.DEVICE


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to a first `Hello`."""

    replica: Replica


class Forgotten(msgspec.Struct, frozen=True, tag="forgotten"):
    """A `Forget` is carried out: `blocks` can no longer be found. The `in_use` ones among them
    are overwritten when the requests that read them end, the others have been."""

    order_id: str
    blocks: int
    in_use: int = 0


Reply = Welcome | Step | Load | Blocks | Forgotten

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_request(frame: bytes, peer: str) -> Request:
    """A frame from an ingress; raises `WireError` for anything else."""
    try:
        request: Request = _requests.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(peer, str(error)) from error
    return request


def decode_reply(frame: bytes, peer: str) -> Reply:
    """A frame from a replica; raises `WireError` for anything else."""
    try:
        reply: Reply = _replies.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(peer, str(error)) from error
    return reply


class Inbox(Protocol):
    """Where a link puts what a replica says; called on the ingress's event loop only."""

    def receive(self, reply: Reply) -> None: ...


class Link(Protocol):
    """One ingress's connection to one replica: the seam between router and engines.

    `workers.channel.ChannelLink` speaks it over ZMQ; `workers.sim.SimEngine` is a replica of
    its own on the event loop's clock. A contract test holds both to the same behaviour.
    """

    def send(self, request: Request) -> None:
        """Queue a message; never blocks. What a dead replica is sent is lost."""
        ...

    def close(self) -> None:
        """Drop the connection; the replica aborts what it ran for it."""
        ...
