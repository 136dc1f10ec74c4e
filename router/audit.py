"""What was planned for each request, and what came of it. No text, no tokens."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kv.plan import Plan
from router.context import RequestContext
from router.request import Request
from workers.messages import Delta, Sources, Spent


class Observer(Protocol):
    """Where finished records go; `router.metrics` has the one that counts."""

    def refused(self, service_class: str, why: str) -> None: ...

    def planned(self, record: "Record", decision_s: float) -> None: ...

    def token(self, record: "Record", gap_s: float) -> None: ...

    def finished(self, record: "Record") -> None: ...


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What a shadow policy would have done; `plan` is None where it failed."""

    policy: str
    outcome: str
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class Footprint:
    """A prompt in blocks: keys of those that may be reused (`kv.block`), tokens of each, and bytes
    of KV that a token takes."""

    keys: Sequence[bytes] = ()
    block_tokens: int = 0
    token_bytes: int = 0


NO_FOOTPRINT = Footprint()
_NO_CONTEXT = RequestContext("")


class Log(Protocol):
    """Where records go once they are closed; `router.audit_log` has the one that writes files."""

    def add(self, record: "Record", footprint: Footprint) -> None:
        """Take a record that nobody changes any more; never waits, and never raises."""
        ...


@dataclass(slots=True)
class Record:
    """One request, from its plan to its end; times are seconds of the ingress's clock.

    What engines told of their time, and when P had its handoff ready, are of the last plan.
    """

    request_id: str
    service_class: str
    prompt_tokens: int
    started_at: float
    plans: list[Plan] = field(default_factory=list)
    # Of the last plan; it answers a little later than the plan is made.
    shadow: Shadowed | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    generated_tokens: int = 0
    prefill_sources: Sources | None = None
    decode_sources: Sources | None = None
    prefill_spent: Spent | None = None
    decode_spent: Spent | None = None
    outcome: str = "aborted"
    context: RequestContext = _NO_CONTEXT
    max_tokens: int | None = None
    local_only: bool = False
    # When each of `plans` was made.
    planned_at: list[float] = field(default_factory=list)
    handed_off_at: float | None = None
    # Seconds that engines computed for plans that failed, as far as they told.
    lost_engine_s: float = 0.0
    max_gap_s: float | None = None
    # Of a batch request, before `started_at`: until its turn came (`router.waiting`).
    waited_s: float = 0.0
    # Its keys are dropped at the end: a thousand long prompts' would take 10 MB.
    footprint: Footprint = NO_FOOTPRINT
    now: Callable[[], float] = field(default=time.monotonic, repr=False)

    def handed_off(self) -> None:
        """P has the prompt's KV ready for D."""
        self.handed_off_at = self.now()

    @property
    def plan(self) -> Plan:
        """The plan that was carried out: the last one."""
        return self.plans[-1]

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    def computed_tokens(self) -> int:
        """Prompt tokens that any engine computed for this request."""
        both = (self.prefill_sources, self.decode_sources)
        return sum(sources.computed_tokens for sources in both if sources is not None)

    def sources(self) -> dict[str, dict[str, int]]:
        """Where each replica's prompt tokens came from, by its part in the plan."""
        both = {"prefill": self.prefill_sources, "decode": self.decode_sources}
        return {role: sources.by_source() for role, sources in both.items() if sources is not None}

    def computing_s(self) -> float | None:
        """Seconds that the last plan's engines computed for the prompt; None if neither told."""
        told = [each for each in (self.prefill_spent, self.decode_spent) if each is not None]
        return sum(each.computing_s for each in told) if told else None

    def mean_gap_s(self) -> float | None:
        """Between two tokens of the answer, on average; None for fewer than two."""
        if self.first_token_at is None or self.last_token_at is None or self.generated_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.generated_tokens - 1)

    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed anywhere for this request."""
        return max(0, self.prompt_tokens - self.computed_tokens())


class Audit:
    """Opens, follows and closes records; keeps the last ones for `/admin/decisions`."""

    def __init__(
        self,
        now: Callable[[], float],
        observer: Observer,
        kept: int = 1000,
        log: Log | None = None,
    ) -> None:
        self._now, self._observer, self._log = now, observer, log
        self.records: deque[Record] = deque(maxlen=kept)

    def open(
        self,
        request: Request,
        plan: Plan,
        started_at: float,
        footprint: Footprint = NO_FOOTPRINT,
        waited_s: float = 0.0,
    ) -> Record:
        """A record of a request that was just planned."""
        record = Record(
            request.context.request_id,
            request.context.service_class,
            request.prompt_tokens,
            started_at,
            context=request.context,
            max_tokens=request.max_tokens,
            local_only=request.local_only,
            waited_s=waited_s,
            footprint=footprint,
            now=self._now,
        )
        self.records.append(record)
        self.plan(record, plan, self._now() - started_at)
        return record

    def refuse(self, request: Request, error: Exception) -> None:
        """A request that never got a plan."""
        self._observer.refused(request.context.service_class, type(error).__name__)

    def plan(self, record: Record, plan: Plan, decision_s: float) -> None:
        """The first plan of a request, or the next one after a failure."""
        if record.plans:
            record.lost_engine_s += record.computing_s() or 0.0
            record.handed_off_at = record.prefill_spent = record.decode_spent = None
        record.plans.append(plan)
        record.planned_at.append(self._now())
        self._observer.planned(record, decision_s)

    def delta(self, record: Record, delta: Delta) -> None:
        """What the decode replica just sent."""
        if not delta.token_ids:
            return
        now = self._now()
        if record.last_token_at is None:
            record.first_token_at = now
        else:
            gap_s = now - record.last_token_at
            record.max_gap_s = max(gap_s, record.max_gap_s or 0.0)
            self._observer.token(record, gap_s)
        record.last_token_at = now
        record.generated_tokens += len(delta.token_ids)

    def close(self, record: Record) -> None:
        """The end; a record that nobody gave an outcome was aborted by its client."""
        record.ended_at = self._now()
        footprint = record.footprint
        record.footprint = replace(footprint, keys=())
        self._observer.finished(record)
        if self._log is not None:
            self._log.add(record, footprint)
