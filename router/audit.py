"""What was planned for each request, and what came of it. No text, no tokens."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kv.plan import Plan
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


@dataclass(slots=True)
class Record:
    """One request, from its plan to its end; times are seconds of the ingress's clock."""

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

    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed anywhere for this request."""
        return max(0, self.prompt_tokens - self.computed_tokens())


class Audit:
    """Opens, follows and closes records; keeps the last ones for `/admin/decisions`."""

    def __init__(self, now: Callable[[], float], observer: Observer, kept: int = 1000) -> None:
        self._now, self._observer = now, observer
        self.records: deque[Record] = deque(maxlen=kept)

    def open(self, request: Request, plan: Plan, started_at: float) -> Record:
        """A record of a request that was just planned."""
        record = Record(
            request.context.request_id,
            request.context.service_class,
            request.prompt_tokens,
            started_at,
        )
        self.records.append(record)
        self.plan(record, plan, self._now() - started_at)
        return record

    def refuse(self, request: Request, error: Exception) -> None:
        """A request that never got a plan."""
        self._observer.refused(request.context.service_class, type(error).__name__)

    def plan(self, record: Record, plan: Plan, decision_s: float) -> None:
        """The first plan of a request, or the next one after a failure."""
        record.plans.append(plan)
        self._observer.planned(record, decision_s)

    def delta(self, record: Record, delta: Delta) -> None:
        """What the decode replica just sent."""
        if not delta.token_ids:
            return
        now = self._now()
        if record.last_token_at is None:
            record.first_token_at = now
        else:
            self._observer.token(record, now - record.last_token_at)
        record.last_token_at = now
        record.generated_tokens += len(delta.token_ids)

    def close(self, record: Record) -> None:
        """The end; a record that nobody gave an outcome was aborted by its client."""
        record.ended_at = self._now()
        self._observer.finished(record)
