"""What a request's time to its first token is made of, predicted and actual, in one form."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What a replica is waited for."""

    QUEUE = "queue"  # it has to do what it was given before
    FETCH = "fetch"  # it takes blocks from tiers
    COMPUTE = "compute"  # it computes prompt tokens
    HANDOFF = "handoff"  # it receives a prefill replica's KV; predictions hold its first step too
    STEP = "step"  # its first step behind a handoff
    REST = "rest"  # messages, and all that its engine does not tell apart


@dataclass(frozen=True, slots=True)
class Part:
    """One replica's `seconds` for something, which begin `start_s` after the plan was made.

    Parts of one replica follow each other; those of two may overlap.
    """

    action: Action
    replica: str
    start_s: float
    seconds: float

    @property
    def end_s(self) -> float:
        """Seconds from the plan to the end of this part."""
        return self.start_s + self.seconds


def in_turn(steps: Iterable[tuple[Action, str, float]], start_s: float = 0.0) -> tuple[Part, ...]:
    """Parts of these seconds, one behind the other from `start_s`; those that take none are left
    out."""
    parts = []
    for action, replica, seconds in steps:
        if seconds > 0.0:
            parts.append(Part(action, replica, start_s, seconds))
            start_s += seconds
    return tuple(parts)
