"""Goodput: the requests a second that met their targets, and what the load's rows say of it.

A request is good when it had its first token within a multiple of what a prompt of its kind takes
on an idle cluster with nothing cached, and its further ones, in the mean, within the same multiple
of the time between tokens of a lone answer. Targets are thus the machine's own.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from benchmarks.breakeven.cells import COMPUTE, OURS
from benchmarks.result import Row, at_least, quantile, shown, spread

AFFINITY, THRESHOLD = "prefix_affinity", "threshold"
POLICIES = (OURS, AFFINITY, THRESHOLD, COMPUTE)
# Issue 5, "Speed".
LEAST = {AFFINITY: 1.15, THRESHOLD: 1.05, COMPUTE: 1.0}


@dataclass(frozen=True, slots=True)
class Targets:
    """Most seconds to the first token by kind, and between tokens in the mean."""

    ttft_s: Mapping[str, float]
    gap_s: float

    def met(self, sent: Mapping[str, Any]) -> bool:
        """Whether a request was good."""
        return not self.late(sent) and not self.slow(sent)

    def late(self, sent: Mapping[str, Any]) -> bool:
        """Whether its first token came too late; one without an answer had none."""
        return sent["ttft_s"] is None or bool(sent["ttft_s"] > self.ttft_s[sent["kind"]])

    def slow(self, sent: Mapping[str, Any]) -> bool:
        """Whether its further tokens were too far apart."""
        return sent["gap_s"] is not None and bool(sent["gap_s"] > self.gap_s)


@dataclass(frozen=True, slots=True)
class Window:
    """One run of one policy at a rate, which is `factor` times the machine's own."""

    policy: str
    factor: float
    number: int
    seconds: float
    sent: Sequence[Mapping[str, Any]]

    def goodput(self, targets: Targets) -> float:
        """Good requests a second."""
        return sum(map(targets.met, self.sent)) / self.seconds


def targets(unloaded: Mapping[str, Any], multiple: float) -> Targets:
    """Multiples of what an idle cluster took."""
    ttft_s = {kind: multiple * statistics.median(each) for kind, each in unloaded["ttft_s"].items()}
    return Targets(ttft_s, multiple * statistics.median(unloaded["gaps_s"]))


def unit_per_s(unloaded: Mapping[str, Any], shares: Mapping[str, float]) -> float:
    """Requests a second that one engine prefills if it computes each whole: the unit of rates."""
    cold_s = {kind: statistics.median(each) for kind, each in unloaded["ttft_s"].items()}
    return 1.0 / sum(share * cold_s[kind] for kind, share in shares.items())


def mean_goodput(windows: Iterable[Window], wanted: Targets) -> float:
    return statistics.fmean(window.goodput(wanted) for window in windows)


def by_factor(windows: Sequence[Window], wanted: Targets) -> dict[str, dict[float, float]]:
    """Mean goodput over rounds: by policy, and by rate."""
    found: dict[str, dict[float, float]] = {}
    for policy in POLICIES:
        of_policy = [window for window in windows if window.policy == policy]
        found[policy] = {
            factor: mean_goodput((w for w in of_policy if w.factor == factor), wanted)
            for factor in sorted({window.factor for window in of_policy})
        }
    return found


def best(windows: Sequence[Window], wanted: Targets) -> dict[str, float]:
    """The rate, by policy, at which its mean goodput over rounds is highest."""
    curves = by_factor(windows, wanted)
    return {policy: max(curve, key=lambda f: curve[f]) for policy, curve in curves.items()}


def rows(windows: Sequence[Window], multiples: Sequence[float], unloaded: Any) -> list[Row]:
    """Ours against each other policy by the first multiple, with issue 5's targets, and by the
    others for comparison; then what each policy had."""
    found = []
    for place, multiple in enumerate(multiples):
        wanted = targets(unloaded, multiple)
        for other, least in LEAST.items():
            found += _against(windows, wanted, other, None if place else least, multiple)
    return [*found, *_each(windows, targets(unloaded, multiples[0]))]


def _against(
    windows: Sequence[Window], wanted: Targets, other: str, least: float | None, multiple: float
) -> list[Row]:
    """At each one's best rate, and over all rates; of each round in the detail."""
    rates = best(windows, wanted)

    def ratio(some: Callable[[Window], bool]) -> tuple[float, str]:
        def mean(policy: str, only: Callable[[Window], bool]) -> float:
            return mean_goodput((w for w in windows if w.policy == policy and only(w)), wanted)

        rounds = sorted({window.number for window in windows})
        of_rounds = [
            quotient(
                *(mean(who, lambda w, n=n: some(w) and w.number == n) for who in (OURS, other))
            )
            for n in rounds
        ]
        ours, theirs = mean(OURS, some), mean(other, some)
        each = f"{ours:.2f} against {theirs:.2f} a second"
        return quotient(ours, theirs), f"{each}; of each round: {spread(of_rounds)}"

    found = []
    for where, some in (
        ("at each one's best rate", lambda w: w.factor == rates[w.policy]),
        ("over all rates", lambda w: True),
    ):
        value, detail = ratio(some)
        name = f"goodput against {other}, {where}, targets {multiple:g}x"
        one = shown(name, value, "x", detail)
        found.append(one if least is None else at_least(name, value, "x", least, detail))
    return found


def quotient(ours: float, theirs: float) -> float:
    """1 where neither had a good request."""
    if not theirs:
        return inf if ours else 1.0
    return ours / theirs


def _each(windows: Sequence[Window], wanted: Targets) -> list[Row]:
    found, rates = [], best(windows, wanted)
    for policy, curve in by_factor(windows, wanted).items():
        sent = [each for w in windows if w.policy == policy for each in w.sent]
        ttft_s = [each["ttft_s"] for each in sent if each["ttft_s"] is not None]
        prompt = sum(each.get("prompt_tokens", 0) for each in sent)
        cached = sum(each.get("cached_tokens", 0) for each in sent) / max(1, prompt)
        at = ", ".join(f"{value:.2f} at {factor:g}" for factor, value in curve.items())
        tail = f"TTFT p50 {quantile(ttft_s, 0.5):.2f}, p95 {quantile(ttft_s, 0.95):.2f} s"
        late, slow = (sum(map(missed, sent)) for missed in (wanted.late, wanted.slow))
        left = f"of {len(sent)}, {late} were late and {slow} slow"
        detail = f"{at} times the unit; {tail}; {cached:.0%} of tokens cached; {left}"
        found.append(shown(f"{policy}: best goodput", curve[rates[policy]], "1/s", detail))
    return found
