"""How fast a replica is: the best that was measured of any like it.

Replicas time themselves when they start, while others start beside them, and whatever else runs
only ever slows a probe: of four like engines on 2 cores one measured 0.5 s for a prompt, another
2.4 s, where each takes 0.4 s. Plans between them would go by that noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kv.curve import PrefillCurve, PrefillSample, fit_prefill
from workers.messages import Replica

# (new tokens, cached tokens)
_At = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Speed:
    """What a prefill costs, and seconds of a step that decodes."""

    curve: PrefillCurve
    step_s: float


@dataclass(frozen=True, slots=True)
class _Best:
    """The least seconds that were measured."""

    prefill_s: Mapping[_At, float] = field(default_factory=dict)
    step_s: float = float("inf")

    def with_(self, replica: Replica) -> "_Best":
        prefill_s = dict(self.prefill_s)
        for new, cached, seconds in replica.prefill_samples:
            prefill_s[new, cached] = min(seconds, prefill_s.get((new, cached), seconds))
        return _Best(prefill_s, min(self.step_s, replica.step_s))

    def speed(self) -> Speed:
        samples = [PrefillSample(*at, seconds) for at, seconds in self.prefill_s.items()]
        return Speed(fit_prefill(samples), self.step_s)


def speed_of(replica: Replica) -> Speed:
    """What a replica measured itself. Raises CurveError if that is nothing."""
    return _Best().with_(replica).speed()


class Speeds:
    """Remembers the best of each kind of replica, those that are gone included."""

    def __init__(self) -> None:
        self._best: dict[tuple[str, str], _Best] = {}

    def learn(self, replica: Replica) -> Speed:
        """The speed of its kind, with what it measured. Raises CurveError if that is nothing."""
        own = speed_of(replica)
        if not replica.hardware:
            return own
        kind = replica.model, replica.hardware
        self._best[kind] = self._best.get(kind, _Best()).with_(replica)
        return self._best[kind].speed()

    def of(self, replica: Replica) -> Speed | None:
        """The speed of its kind; None for one that has no kind, or none was learned of."""
        best = self._best.get((replica.model, replica.hardware))
        return best.speed() if best is not None and replica.hardware else None
