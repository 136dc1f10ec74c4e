"""Records as a pipeline makes them, for the tests of what is written of them."""

from collections.abc import Callable

from kv.block import chain, pack_tokens, root_key
from kv.plan import Plan, Reason, Shape, Source, Span
from router.audit import Audit, Footprint, Record
from router.context import RequestContext, ServiceClass
from router.request import Request
from workers.messages import Delta, Sources, Spent

BLOCK_TOKENS, TOKEN_BYTES = 4, 1000
LOCAL = Plan(
    Shape.LOCAL,
    Reason.ONLY_REPLICA,
    None,
    "decode-0",
    (Span(Source.COMPUTE, 0, 10, "decode-0"),),
    predicted_ttft_s=0.5,
    cost_s=0.5,
    rivals=(),
)
REMOTE = Plan(
    Shape.REMOTE,
    Reason.CHEAPER_REMOTE,
    "prefill-0",
    "decode-0",
    (Span(Source.COMPUTE, 0, 10, "prefill-0"),),
    predicted_ttft_s=0.5,
    cost_s=0.5,
    rivals=(),
)


class Clock:
    """Stands still unless told."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class SilentObserver:
    """Counts nothing."""

    def refused(self, service_class: str, why: str) -> None: ...

    def planned(self, record: Record, decision_s: float) -> None: ...

    def token(self, record: Record, gap_s: float) -> None: ...

    def finished(self, record: Record) -> None: ...


def request(name: str = "r1", tenant: str = "acme", tokens: int = 10, **fields: object) -> Request:
    context = RequestContext(
        name, tenant, ServiceClass.BATCH, cache_key="conversation-7", timeout_s=30.0
    )
    return Request(name, pack_tokens(range(tokens)), b"", "salt", context, **fields)


def footprint(asked: Request) -> Footprint:
    keys = chain(root_key(asked.salt), asked.tokens[:-4], BLOCK_TOKENS)
    return Footprint(keys, BLOCK_TOKENS, TOKEN_BYTES)


def remote(clock: Clock, audit: Audit, asked: Request) -> Record:
    """Planned at 100 s, handed off at 100.3, three tokens to 100.6, ended at 100.7."""
    record = audit.open(asked, REMOTE, 100.0, footprint(asked))
    record.prefill_sources = Sources(10, 6, 4, 0)
    record.prefill_spent = Spent(0.05, 0.0, 0.2)
    clock.now_s = record.handed_off_at = 100.3
    record.decode_sources = Sources(10, 1, 0, 9)
    record.decode_spent = Spent(0.02, 0.0, 0.03)
    for now_s, token in ((100.4, 7), (100.45, 8), (100.6, 9)):
        clock.now_s = now_s
        audit.delta(record, Delta(asked.request_id, [token]))
    record.outcome = "stop"
    clock.now_s = 100.7
    audit.close(record)
    return record


def audit_of(clock: Callable[[], float], **named: object) -> Audit:
    return Audit(clock, SilentObserver(), **named)
