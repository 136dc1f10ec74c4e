"""A second policy that answers the same questions, so that it can be judged before it is in force.

It plans after the request was sent to its replicas, on the ingress's event loop: no decision waits
for it and none of its errors reaches a request, but it costs the ingress the time of its planning.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kv.codecs.codec import CodecName
from kv.plan import Plan
from router.audit import NO_FOOTPRINT, Footprint, Record, Shadowed
from router.orders import Order
from router.policy import Policy
from router.policy.question import Question
from router.policy.registry import CHOOSE, Choose

logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a shadow's plan compares to the one that was carried out: a closed list."""

    SAME = "same"
    REPLICA = "replica"  # the same shape on another replica
    SHAPE = "shape"  # local for remote, or the reverse
    FAILED = "failed"  # the shadow raised


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked, under which order, and the plan of the policy in force; the prompt in blocks,
    as it was looked up; and the lossy codec that it may be fetched by."""

    question: Question
    order: Order
    plan: Plan
    footprint: Footprint = NO_FOOTPRINT
    codec: CodecName | None = None


@dataclass(slots=True)
class Tally:
    """One shadow against one policy in force; sums of predicted seconds, of plans compared."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    live_ttft_s: float = 0.0
    shadow_ttft_s: float = 0.0

    @property
    def compared(self) -> int:
        return self.outcomes.total() - self.outcomes[Outcome.FAILED]

    @property
    def mean_difference_s(self) -> float | None:
        """How much later the shadow's first tokens are predicted, on average."""
        if not self.compared:
            return None
        return (self.shadow_ttft_s - self.live_ttft_s) / self.compared


class Shadow:
    """Answers behind the policy in force, and counts where the two differ."""

    def __init__(self, choosers: Mapping[Policy, Choose] = CHOOSE) -> None:
        self._choosers = choosers
        # By the policy in force and the shadow.
        self.tallies: dict[tuple[Policy, Policy], Tally] = {}
        self._failed: set[Policy] = set()

    def follow(self, choice: Choice, record: Record) -> None:
        """Let the shadow answer soon, and note it in `record`; without a shadow nothing happens."""
        record.shadow = None
        shadow = choice.order.shadow
        if shadow is not None and shadow is not choice.order.policy:
            asyncio.get_running_loop().call_soon(self._answer, shadow, choice, record)

    def _answer(self, shadow: Policy, choice: Choice, record: Record) -> None:
        tally = self.tallies.setdefault((choice.order.policy, shadow), Tally())
        try:
            plan = self._choosers[shadow](choice.question)
            plan = plan if choice.codec is None else plan.coded(choice.codec)
        # The edge of a policy that is on trial: nothing of it may reach the request.
        except Exception:
            tally.outcomes[Outcome.FAILED] += 1
            record.shadow = Shadowed(shadow, Outcome.FAILED, None)
            if shadow not in self._failed:
                logger.exception("shadow policy %s failed; later failures are counted", shadow)
            self._failed.add(shadow)
            return
        outcome = _compared(choice.plan, plan)
        tally.outcomes[outcome] += 1
        tally.live_ttft_s += choice.plan.predicted_ttft_s
        tally.shadow_ttft_s += plan.predicted_ttft_s
        record.shadow = Shadowed(shadow, outcome, plan)


def _compared(live: Plan, shadow: Plan) -> Outcome:
    if live.shape is not shadow.shape:
        return Outcome.SHAPE
    same = (live.prefill, live.decode) == (shadow.prefill, shadow.decode)
    return Outcome.SAME if same else Outcome.REPLICA
