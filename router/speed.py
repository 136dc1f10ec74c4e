"""How fast a replica is: the best that was measured of any like it, until requests tell.

Replicas time themselves when they start, while others start beside them, and whatever else runs
only ever slows a probe: of four like engines on 2 cores one measured 0.5 s for a prompt, another
2.4 s, where each takes 0.4 s. Plans between them would go by that noise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kv.curve import PrefillCurve, PrefillSample, fit_prefill
from kv.live import RETRY_S, TYPICAL_TOKENS, LivePrefill
from router.curve_book import LEAST_SAMPLES, KeptPrefill
from workers.messages import Replica

NOTHING_KEPT: Mapping[str, KeptPrefill] = MappingProxyType({})
# From so many requests on, one that is so many times as fast as was known tells of its kind:
# nothing makes an engine faster than it is.
_SHARED_AFTER, _SHARED = 3, 1.1
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
    """Remembers the best of each kind of replica, those that are gone included, and what requests
    told of each replica that is there. Times are seconds of any one clock; `kept` is what earlier
    clusters knew, by hardware, and `retry_s` is `kv.live`'s."""

    def __init__(
        self,
        kept: Mapping[str, KeptPrefill] = NOTHING_KEPT,
        retry_s: float | None = RETRY_S,
    ) -> None:
        self._kept, self._retry_s = kept, retry_s
        self._best: dict[tuple[str, ...], _Best] = {}
        self._measured: dict[tuple[str, ...], Speed] = {}
        self._shared: dict[tuple[str, ...], PrefillCurve] = {}
        self._live: dict[str, LivePrefill] = {}

    def learn(self, replica: Replica) -> None:
        """What a replica measured. Raises CurveError if that is nothing."""
        speed_of(replica)
        kind = _kind(replica)
        best = self._best[kind] = self._best.get(kind, _Best()).with_(replica)
        measured, kept = best.speed(), self._kept.get(replica.hardware)
        known = (self._shared.get(kind), None if kept is None else kept.curve())
        curves = (measured.curve, *(curve for curve in known if curve is not None))
        self._measured[kind] = replace(measured, curve=min(curves, key=_typical_s))

    def saw(self, replica: Replica, sample: PrefillSample, now_s: float) -> bool:
        """One request's prefill on a replica that was learned; whether it shows that all of its
        kind are faster than was known, which holds for those of which no request has told."""
        kind, live = _kind(replica), self._live.get(replica.epoch)
        measured = self._measured[kind]
        if live is None:
            live = self._live[replica.epoch] = LivePrefill(measured.curve, self._retry_s)
        borne_out = live.saw(sample, now_s) and live.samples >= _SHARED_AFTER
        curve = live.curve(now_s)
        if not borne_out or _SHARED * _typical_s(curve) > _typical_s(measured.curve):
            return False
        self._shared[kind] = curve
        self._measured[kind] = replace(measured, curve=curve)
        return True

    def of(self, replica: Replica, now_s: float) -> Speed:
        """How fast a replica is that was learned. What only small requests told of says little of
        large ones: for those it is taken to be as fast as any of its kind."""
        measured, live = self._measured[_kind(replica)], self._live.get(replica.epoch)
        if live is None:
            return measured
        curve = live.curve(now_s)
        if not live.borne_out:
            per_token_s = min(curve.per_token_s, measured.curve.per_token_s)
            per_token2_s = min(curve.per_token2_s, measured.curve.per_token2_s)
            curve = replace(curve, per_token_s=per_token_s, per_token2_s=per_token2_s)
        return replace(measured, curve=curve)

    def live(self, replica: Replica) -> LivePrefill | None:
        """What requests told of a replica."""
        return self._live.get(replica.epoch)

    def forget(self, replica: Replica) -> None:
        """It has left."""
        self._live.pop(replica.epoch, None)

    def worth_keeping(self, replicas: Iterable[Replica], now_s: float) -> dict[str, KeptPrefill]:
        """By hardware, the curve of that replica of which most is known."""
        kept: dict[str, KeptPrefill] = {}
        for replica in replicas:
            live, known = self.live(replica), kept.get(replica.hardware)
            enough = max(LEAST_SAMPLES, known.samples if known is not None else 0)
            if replica.hardware and live is not None and live.samples >= enough:
                kept[replica.hardware] = KeptPrefill.of(live.curve(now_s), live.samples)
        return kept


def _kind(replica: Replica) -> tuple[str, ...]:
    """Replicas of one kind are equally fast; one that does not say what it runs on is alone."""
    return (replica.model, replica.hardware) if replica.hardware else (replica.epoch,)


def _typical_s(curve: PrefillCurve) -> float:
    return curve.seconds(TYPICAL_TOKENS, 0)
