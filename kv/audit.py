"""The audit's lines: what was planned for one request and what came of it, as JSON.

docs/audit.md explains each field. A line holds no text and no token ids: tenants, sessions and
blocks go by pseudonyms (`router.pseudonyms`), which compare equal within one capture and say
nothing else. It holds what a simulator needs to run the request again.

A version knows all of its fields' names. One that is added later has a default, so that older
lines stay readable; a change of another kind makes a new version.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from kv.errors import KVError
from kv.parts import Part
from kv.plan import Plan

VERSION = 1
# The class whose requests give way to others (`router.context.ServiceClass`).
BATCH = "batch"
# Of one block's pseudonym: two of ten million blocks share one with a chance of 3 in a million.
NAME_BYTES = 8
# Longer lines are not read: the blocks of a million tokens take a tenth of it.
MAX_LINE_BYTES = 4 << 20

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
# By a replica's part in the plan (prefill, decode), then by source.
BySource = dict[str, dict[str, Count]]


class Asked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt and its limits, as far as routing and engines depend on them.

    `blocks` are the pseudonyms of the prompt's leading full blocks, 8 bytes each, as base64; the
    block of the last token has none, since engines always compute that one. `seconds` of a timeout
    count from the arrival.
    """

    prompt_tokens: Count
    block_tokens: Count = 0
    blocks: bytes = b""
    max_tokens: int | None = None
    timeout_s: float | None = None
    local_only: bool = False
    codec: str | None = None
    retention_s: float | None = None

    def __post_init__(self) -> None:
        if len(self.blocks) % NAME_BYTES:
            raise ValueError(f"blocks: {len(self.blocks)} bytes, {NAME_BYTES} a block wanted")

    def names(self) -> list[bytes]:
        """The pseudonym of each block, in prompt order."""
        return [self.blocks[at : at + NAME_BYTES] for at in range(0, len(self.blocks), NAME_BYTES)]


class Planned(msgspec.Struct, frozen=True):
    """A plan, and when it was made, in seconds from the request's arrival."""

    after_s: Seconds
    plan: Plan


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename={"service_class": "class"}):
    """One request that was planned.

    `at_s` is its arrival in seconds since 1970, or when its turn came, for which a batch request
    had waited `waited_s` at its ingress. The last of `plans` was carried out, those before it
    failed. `parts` are the actual seconds of that one, on its own clock; empty where no token came
    under it. `moved_bytes` are KV that came to a replica for this prompt, by where from;
    `engine_s` are seconds that engines were computing the prompt, None where none told.
    """

    v: int = VERSION
    capture: str
    request_id: str
    at_s: float
    model: str
    tenant: str
    session: str | None = None
    service_class: str
    asked: Asked
    plans: Annotated[tuple[Planned, ...], Meta(min_length=1)]
    outcome: str
    ttft_s: Seconds | None = None
    itl_mean_s: Seconds | None = None
    itl_max_s: Seconds | None = None
    total_s: Seconds | None = None
    answer_tokens: Count = 0
    sources: BySource = {}
    moved_bytes: BySource = {}
    engine_s: Seconds | None = None
    parts: tuple[Part, ...] = ()
    waited_s: Seconds = 0.0

    @property
    def plan(self) -> Plan:
        """The plan that was carried out."""
        return self.plans[-1].plan

    @property
    def error_ratio(self) -> float | None:
        """Actual over predicted TTFT; None without either, for a request that was planned anew,
        whose TTFT holds a failure that no curve predicts, and for a batch request: how long it
        gives way to others none predicts either."""
        predicted_s = self.plan.predicted_ttft_s
        if self.ttft_s is None or len(self.plans) > 1 or predicted_s <= 0.0:
            return None
        if self.service_class == BATCH:
            return None
        return self.ttft_s / predicted_s


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no entry: its number, from 1, and what is wrong with it."""

    number: int
    complaint: str


class _Versioned(msgspec.Struct, frozen=True):
    v: int


_encoder = msgspec.json.Encoder()
_entries = msgspec.json.Decoder(Entry)
_versions = msgspec.json.Decoder(_Versioned)


def encode(entry: Entry) -> bytes:
    """One entry as one line, its end included."""
    return _encoder.encode(entry) + b"\n"


def read(lines: Iterable[bytes], bad: Callable[[BadLine], None]) -> Iterator[Entry]:
    """The entries of `lines`, in their order; what is none is told to `bad`, and read past.

    Empty lines are no lines.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = _read(line)
        if isinstance(entry, Entry):
            yield entry
        else:
            bad(BadLine(number, entry))


def _read(line: bytes) -> Entry | str:
    """An entry, or why it is none."""
    if len(line) > MAX_LINE_BYTES:
        return f"more than {MAX_LINE_BYTES} bytes"
    try:
        version = _versions.decode(line).v
        if version != VERSION:
            return f"version {version}, {VERSION} is known here"
        return _entries.decode(line)
    except (msgspec.MsgspecError, KVError) as error:
        return str(error)
    except RecursionError:
        return "nested too deeply"
