"""From a record to the audit's entry: under pseudonyms, and by the clock on the wall."""

from collections.abc import Callable

from kv.audit import Asked, Entry, Planned
from router import actual
from router.audit import NO_FOOTPRINT, Footprint, Record
from router.policy.session import affinity
from router.pseudonyms import Pseudonyms

# Of a record that is not closed.
RUNNING = "running"


class Scribe:
    """Writes records down. `now` is the records' clock, `wall` gives seconds since 1970; `model` is
    the name under which clients ask."""

    def __init__(
        self,
        pseudonyms: Pseudonyms,
        model: str,
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._pseudonyms, self._model, self._now, self._wall = pseudonyms, model, now, wall

    def entry(self, record: Record, footprint: Footprint = NO_FOOTPRINT) -> Entry:
        """A record's entry; `footprint` has its blocks, which an entry for operators lacks."""
        began, ended, context = record.started_at, record.ended_at, record.context
        session = affinity(context.tenant, context.cache_key)
        plans = zip(record.planned_at, record.plans, strict=True)
        return Entry(
            capture=self._pseudonyms.capture,
            request_id=record.request_id,
            at_s=self._wall() - (self._now() - began),
            model=self._model,
            tenant=self._pseudonyms.tenant(context.tenant),
            session=self._pseudonyms.session(session),
            service_class=record.service_class,
            asked=self._asked(record, footprint),
            plans=tuple(Planned(at - began, plan) for at, plan in plans),
            outcome=RUNNING if ended is None else record.outcome,
            ttft_s=record.ttft_s,
            itl_mean_s=record.mean_gap_s(),
            itl_max_s=record.max_gap_s,
            total_s=None if ended is None else ended - began,
            answer_tokens=record.generated_tokens,
            sources=record.sources(),
            moved_bytes=actual.moved_bytes(record),
            engine_s=actual.engine_s(record),
            parts=actual.parts(record),
            waited_s=record.waited_s,
        )

    def _asked(self, record: Record, footprint: Footprint) -> Asked:
        context = record.context
        return Asked(
            prompt_tokens=record.prompt_tokens,
            block_tokens=record.footprint.block_tokens,
            blocks=self._pseudonyms.blocks(footprint.keys),
            max_tokens=record.max_tokens,
            timeout_s=context.timeout_s,
            local_only=record.local_only,
            codec=context.codec,
            retention_s=context.retention_s,
        )
