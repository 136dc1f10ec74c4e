"""One audited request as lines that a person reads: planned, predicted, and what happened."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf

from kv.audit import Entry
from kv.parts import Action, Part
from kv.plan import Plan, Reason, Rival, Source

_BAR_COLUMNS = 32
_NAMES = {
    Action.QUEUE: "queue",
    Action.FETCH: "fetch",
    Action.COMPUTE: "compute",
    Action.HANDOFF: "handoff",
    Action.STEP: "first step",
    Action.REST: "other",
}
_WHY = {
    Reason.ONLY_REPLICA: "nothing else was routable",
    Reason.CHEAPER_LOCAL: "computing where it is answered costs less than the best handoff",
    Reason.CHEAPER_REMOTE: "computing on a prefill replica costs less, handoff included",
    Reason.CHEAPER_FETCH: "taking a prefix from tiers costs less than computing it",
    Reason.OVERLAP: "computing the head while the tail is fetched costs less than either alone",
    Reason.NO_PREFILL_REPLICA: "no prefill replica was routable",
    Reason.NO_CATALOGUE: "nobody could say what is cached where",
    Reason.SESSION: "about as cheap as the best, and where this session's other turns go",
    Reason.KEPT: "about as cheap as the best, and where its prefix is already",
    Reason.EXPLORED: "to find out whether curves that were not used for long still hold",
    Reason.PROMPT_LOGPROBS: "its prompt's logprobs are computed where it is answered",
    Reason.LEAST_LOADED: "the replica with the least load; costs were not looked at",
    Reason.PREFIX_AFFINITY: "the longest cached prefix; costs were not looked at",
    Reason.ROUND_ROBIN: "whose turn it was; costs were not looked at",
    Reason.PREFILL_LOST: "the plan before lost its prefill replica",
    Reason.DECODE_LOST: "the plan before lost its decode replica",
}
_WELL = frozenset({"stop", "length"})
_SOURCES = {Source.HIT: "device", Source.COMPUTE: "computed"}
# A part that is off by less, in seconds or of the predicted TTFT, is not worth a line.
_NOTABLE_S, _NOTABLE = 0.01, 0.1


@dataclass(frozen=True, slots=True)
class Marks:
    """What bars are drawn with, where a terminal can show it."""

    predicted: str = "░"
    actual: str = "█"


ASCII = Marks("-", "#")


def lines(entry: Entry, marks: Marks = ASCII) -> list[str]:
    """All of one request, without line ends. What came from files is made harmless for terminals:
    no line holds a control character."""
    sections = (
        _head(entry),
        _earlier(entry),
        _planned(entry),
        _timeline(entry, marks),
        _rivals(entry),
        _tokens(entry),
        _differences(entry),
    )
    shown = (list(section) for section in sections)
    return [_plain(line) for section in shown if section for line in (*section, "")][:-1]


def differences(entry: Entry) -> list[str]:
    """Where what happened was not what the plan says: tokens from elsewhere than planned, the part
    that was furthest off, and an end before the answer's own."""
    return [*_other_sources(entry), *_furthest_off(entry), *_early_end(entry)]


def _head(entry: Entry) -> Iterator[str]:
    at = datetime.fromtimestamp(entry.at_s, UTC) if 0 <= entry.at_s < 1e11 else None
    when = f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d} UTC" if at else f"{entry.at_s} s"
    session = f", session {entry.session}" if entry.session else ""
    yield f"{entry.request_id}: {entry.service_class} request of tenant {entry.tenant}{session}"
    yield f"  {when}, model {entry.model}"
    yield f"  prompt of {_many(entry.asked.prompt_tokens)}, answer of {_answer(entry)}"
    if entry.waited_s >= 0.001:
        yield f"  waited {_s(entry.waited_s)} at the ingress for its turn, before all that follows"
    yield f"  {_first_token(entry)}{_gaps(entry)}"


def _answer(entry: Entry) -> str:
    total = "" if entry.total_s is None else f", all of it in {_s(entry.total_s)}"
    return f"{_many(entry.answer_tokens)} ({entry.outcome}{total})"


def _first_token(entry: Entry) -> str:
    predicted_s = entry.plan.predicted_ttft_s
    predicted = f"predicted {_s(predicted_s)}" if predicted_s > 0.0 else "not predicted"
    if entry.ttft_s is None:
        return f"no token came; {predicted}"
    ratio = entry.error_ratio
    times = "" if ratio is None else f": {ratio:.2f} times as long"
    return f"first token after {_s(entry.ttft_s)}, {predicted}{times}"


def _gaps(entry: Entry) -> str:
    if entry.itl_mean_s is None or entry.itl_max_s is None:
        return ""
    mean, most = 1000 * entry.itl_mean_s, 1000 * entry.itl_max_s
    return f"; then a token each {mean:.1f} ms, at most {most:.1f} ms"


def _earlier(entry: Entry) -> Iterator[str]:
    """The plans that failed, and when the next one was made."""
    for number, planned in enumerate(entry.plans[:-1]):
        after = entry.plans[number + 1]
        where, when = _where(planned.plan), _s(after.after_s)
        yield f"plan {number + 1} failed: {where}; planned anew after {when}"


def _planned(entry: Entry) -> Iterator[str]:
    plan = entry.plan
    why = _WHY.get(plan.reason, plan.reason.replace("_", " "))
    yield f"plan: {_where(plan)}"
    yield f"  {plan.reason}: {why}"
    for span in plan.spans:
        at = f"{span.replica}, from {span.tier}" if span.tier else span.replica
        at = f"{at} by {span.codec}" if span.codec else at
        tokens = f"{span.tokens:,}"
        yield f"  {span.source:<8}{tokens:>8} tokens  {at}"


def _where(plan: Plan | Rival) -> str:
    if plan.prefill is None:
        return f"{plan.shape} on {plan.decode}"
    return f"{plan.shape} on {plan.prefill} for {plan.decode}"


def _timeline(entry: Entry, marks: Marks) -> Iterator[str]:
    """Two bars for each part, on one scale; the actual one is below."""
    rows = _rows(entry)
    if not rows:
        return
    whole_s = max(part.end_s for part in (*entry.plan.parts, *entry.parts))
    wide = max(len(part.replica) for part in (*entry.plan.parts, *entry.parts))
    yield f"{'':15}{'':{wide}}  predicted     actual"
    for action, replica, predicted, actual in rows:
        seconds = f"{_or_none(predicted, action):>11}{_or_none(actual):>11}"
        begun = f"{_NAMES[action]:<15}{replica:<{wide}}{seconds}  "
        above = _bar(predicted, whole_s, marks.predicted)
        below = _bar(actual, whole_s, marks.actual)
        yield (begun + (above or below)).rstrip()
        if above and below:
            yield " " * len(begun) + below


def _rows(entry: Entry) -> list[tuple[Action, str, Part | None, Part | None]]:
    """Each part by what it is and where, predicted and actual, in the order that they began."""
    predicted, actual = _by_place(entry.plan.parts), _by_place(entry.parts)
    order = {action: number for number, action in enumerate(Action)}

    def begun(place: tuple[Action, str]) -> tuple[bool, float, int]:
        part = actual.get(place) or predicted[place]
        return place[1] != entry.plan.prefill, part.start_s, order[place[0]]

    places = sorted({**predicted, **actual}, key=begun)
    return [(*place, predicted.get(place), actual.get(place)) for place in places]


def _by_place(parts: Iterable[Part]) -> dict[tuple[Action, str], Part]:
    """Parts by action and replica; a second one of the same lengthens the first."""
    found: dict[tuple[Action, str], Part] = {}
    for part in parts:
        place = (part.action, part.replica)
        first = found.get(place)
        if first is not None:
            part = Part(*place, first.start_s, first.seconds + part.seconds)
        found[place] = part
    return found


def _bar(part: Part | None, whole_s: float, mark: str) -> str:
    # A file may say anything.
    if part is None or not 0.0 < whole_s < inf or part.start_s < 0.0:
        return ""
    begin, end = (round(_BAR_COLUMNS * (at / whole_s)) for at in (part.start_s, part.end_s))
    return " " * min(begin, _BAR_COLUMNS - 1) + mark * max(1, end - begin)


def _rivals(entry: Entry) -> Iterator[str]:
    plan = entry.plan
    if not plan.rivals:
        return
    yield "  predicted       cost"
    yield f"{_priced(plan)}  chosen  {_where(plan)}"
    for rival in plan.rivals:
        yield f"{_priced(rival)}  rival   {_where(rival)}{_dearer(rival, plan)}"


def _priced(each: Plan | Rival) -> str:
    return f"{_s(each.predicted_ttft_s):>11}{_s(each.cost_s):>11}"


def _dearer(rival: Rival, plan: Plan) -> str:
    if plan.cost_s <= 0.0:
        return ""
    return f" ({100 * (rival.cost_s / plan.cost_s - 1):+.0f} %)"


def _tokens(entry: Entry) -> Iterator[str]:
    for role, by_source in entry.sources.items():
        told = ", ".join(f"{tokens:,} {source}" for source, tokens in by_source.items())
        yield f"tokens at {_replica(entry, role)}: {told or 'none'}"
    for role, by_source in entry.moved_bytes.items():
        moved = ", ".join(f"{size / 1e6:.1f} MB {source}" for source, size in by_source.items())
        yield f"moved to {_replica(entry, role)}: {moved}"
    if entry.engine_s is not None:
        yield f"engines were computing the prompt for {_s(entry.engine_s)}"


def _replica(entry: Entry, role: str) -> str:
    return (entry.plan.prefill if role == "prefill" else entry.plan.decode) or role


def _differences(entry: Entry) -> Iterator[str]:
    found = differences(entry)
    if found:
        yield "what differed from the plan:"
        yield from (f"  {each}" for each in found)


def _other_sources(entry: Entry) -> Iterator[str]:
    """Tokens that a replica of the plan took from elsewhere than its spans say."""
    for role, got in entry.sources.items():
        replica = _replica(entry, role)
        planned = _planned_at(entry.plan, replica)
        if not planned:  # it receives what another one has
            continue
        for source in sorted((planned.keys() | got.keys()) - {"received"}):
            has, wanted = got.get(source, 0), planned.get(source, 0)
            if has != wanted:
                yield f"{replica}: {has:,} tokens {_from(source)}, {wanted:,} planned"


def _planned_at(plan: Plan, replica: str) -> dict[str, int]:
    """Tokens that a plan has from each source on one replica."""
    planned: dict[str, int] = {}
    for span in plan.spans:
        if span.replica == replica:
            source = _SOURCES.get(span.source) or str(span.tier)
            planned[source] = planned.get(source, 0) + span.end_token - span.start_token
    return planned


def _from(source: str) -> str:
    return source if source == "computed" else f"from {source}"


def _furthest_off(entry: Entry) -> Iterator[str]:
    """The part whose seconds were furthest from the predicted ones, if that is much."""
    if not (entry.plan.parts and entry.parts):
        return
    off: dict[tuple[Action, str], float] = {}
    for action, replica, predicted, actual in _rows(entry):
        # A link's curve ends with the first step.
        place = (Action.HANDOFF if action is Action.STEP else action, replica)
        off[place] = off.get(place, 0.0) + _seconds(actual) - _seconds(predicted)
    (action, replica), seconds = max(off.items(), key=lambda each: abs(each[1]))
    if abs(seconds) > max(_NOTABLE_S, _NOTABLE * entry.plan.predicted_ttft_s):
        yield f"furthest off: {_NAMES[action]} at {replica}, {seconds:+.3f} s"


def _early_end(entry: Entry) -> Iterator[str]:
    if entry.outcome == "running":
        yield "it has not ended yet"
    elif entry.outcome not in _WELL:
        limit = entry.asked.timeout_s
        bound = f" of {limit:g} s" if entry.outcome == "deadline" and limit is not None else ""
        yield f"it did not come to its end: {entry.outcome}{bound}"


def _seconds(part: Part | None) -> float:
    return 0.0 if part is None else part.seconds


def _or_none(part: Part | None, action: Action | None = None) -> str:
    if part is None:
        return "in handoff" if action is Action.STEP else "-"
    return _s(part.seconds)


def _s(seconds: float) -> str:
    return f"{seconds:,.3f} s"


def _many(tokens: int) -> str:
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"


def _plain(text: str) -> str:
    """Without what moves a cursor or changes a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
