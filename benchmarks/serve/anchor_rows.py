"""From the turns of the anchor's systems to rows: medians, with the spread as the detail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anchor_faults import AFTER_S, CLIENTS, OUTPUT_TOKENS, PROMPT_TOKENS
from anchor_load import median

Turn = dict[str, Any]

TITLES = {
    "ours": "ours",
    "documented": "Ray Serve LLM, as documented",
    "tuned": "Ray Serve LLM, tuned",
}
KILLED = "prefill killed"
# More than that is another program at work.
QUIET_CORES = 0.3
KILL_LOAD = f"{CLIENTS} clients, {PROMPT_TOKENS}-token prompts, {OUTPUT_TOKENS} tokens out"


@dataclass(frozen=True)
class Row:
    """One figure; `target` is None where none was asked for, `value` where none could be had."""

    name: str
    value: float | None
    unit: str
    target: float | None
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Figure:
    """What is compared; `pick` reads it from a turn, None where the turn lacks it."""

    title: str
    unit: str
    pick: Callable[[Turn], float | None]
    more_is_better: bool = False
    note: str = ""

    def best(self, values: Sequence[float]) -> float | None:
        if not values:
            return None
        return max(values) if self.more_is_better else min(values)

    def reaches(self, value: float | None, target: float | None) -> bool:
        if target is None:
            return True
        return value is not None and self.best((value, target)) == value


def rows_of(turns: Sequence[Turn], shapes: Sequence[str]) -> list[Row]:
    """Rows of all figures that turns were made for."""
    figures = [Figure("time to ready", "s", lambda turn: turn.get("ready_s"))]
    for shape in shapes:
        figures += _of_load(shape)
    if any("kill" in turn for turn in turns):
        figures += _of_kill()
    return [row for figure in figures for row in _compare(figure, turns)]


def _of_load(shape: str) -> list[Figure]:
    def pick(key: str) -> Callable[[Turn], float | None]:
        return lambda turn: turn.get("loads", {}).get(shape, {}).get(key)

    return [
        Figure(f"TTFT p50, {shape}", "s", pick("ttft_p50_s")),
        Figure(f"TTFT p99, {shape}", "s", pick("ttft_p99_s")),
        Figure(f"ITL p50, {shape}", "s", pick("itl_p50_s")),
        Figure(f"gap between chunks p99, {shape}", "s", pick("gap_p99_s")),
        Figure(f"throughput, {shape}", "tokens/s", pick("tokens_per_s"), more_is_better=True),
    ]


def _of_kill() -> list[Figure]:
    def figure(title: str, unit: str, pick: Callable[[Turn], float | None]) -> Figure:
        def picked(turn: Turn) -> float | None:
            return pick(turn["kill"]) if "kill" in turn else None

        more_is_better = unit != "s"
        return Figure(f"{KILLED}: {title}", unit, picked, more_is_better, KILL_LOAD)

    after = f"of the next {AFTER_S:.0f} s"
    return [
        figure("requests in flight answered", "share", lambda kill: _share(kill["in_flight"])),
        figure(f"requests {after} answered", "share", lambda kill: _share(kill["new"])),
        figure(f"answered requests {after}", "requests", lambda kill: kill["new"]["answered"]),
        figure(f"median answer {after}", "s", lambda kill: kill["new"]["median_s"]),
        figure("longest wait of a client", "s", _longest),
        figure("first answer to a new request", "s", lambda kill: kill["first_new_answer_s"]),
        figure("prefill works again", "s", lambda kill: kill["prefill_back_s"]),
    ]


def _share(outcomes: dict[str, Any]) -> float | None:
    return outcomes["answered"] / outcomes["requests"] if outcomes["requests"] else None


def _longest(kill: dict[str, Any]) -> float | None:
    waits = [kill[which]["longest_s"] for which in ("in_flight", "new")]
    return max((wait for wait in waits if wait is not None), default=None)


def _compare(figure: Figure, turns: Sequence[Turn]) -> list[Row]:
    """A row a system; ours aims at the better one of the others."""
    found = {name: [t for t in turns if t["system"] == name] for name in TITLES}
    middles = {name: median([figure.pick(t) for t in found[name]]) for name in TITLES}
    theirs = [value for name, value in middles.items() if name != "ours" and value is not None]
    rows = []
    for name, title in TITLES.items():
        if not found[name]:
            continue
        value, target = middles[name], figure.best(theirs) if name == "ours" else None
        ok = figure.reaches(value, target)
        detail = _detail(figure, found[name])
        row_name = f"{figure.title}: {title}"
        rows.append(Row(row_name, _rounded(value), figure.unit, _rounded(target), ok, detail))
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _detail(figure: Figure, turns: Sequence[Turn]) -> str:
    known = [value for value in map(figure.pick, turns) if value is not None]
    if not known:
        why = [turn["failure"][-300:] for turn in turns if "failure" in turn]
        return f"not measured: {why[-1] if why else 'no request was answered'}"
    parts = [f"{min(known):.3g} to {max(known):.3g} in {len(known)} of {len(turns)} turns"]
    parts += _disturbed(turns)
    if figure.title.startswith("TTFT p50"):
        parts += _plans(turns, figure.title.split(", ", 1)[1])
    if figure.title.startswith(KILLED):
        parts += _errors(turns)
    return "; ".join([*parts, figure.note] if figure.note else parts)


def _disturbed(turns: Sequence[Turn]) -> list[str]:
    """Turns that began while something else computed: their figures are worse than they need be."""
    busy = [turn.get("cores_busy_before", 0.0) for turn in turns]
    late = [cores for cores in busy if cores > QUIET_CORES]
    return [f"{len(late)} began with up to {max(late):.1f} cores busy elsewhere"] if late else []


def _plans(turns: Sequence[Turn], shape: str) -> list[str]:
    """How many requests our router sent where; only ours has such counts."""
    sums: dict[str, float] = {}
    for turn in turns:
        for plan, count in turn.get("loads", {}).get(shape, {}).get("plans", {}).items():
            sums[plan] = sums.get(plan, 0.0) + count
    used = [f"{count:.0f} {plan}" for plan, count in sorted(sums.items()) if count]
    return [f"plans: {', '.join(used)}"] if used else []


def _errors(turns: Sequence[Turn]) -> list[str]:
    """What clients were told, without the ids that make each message its own."""
    kills = [turn["kill"] for turn in turns if "kill" in turn]
    all_errors = [e for k in kills for which in ("in_flight", "new") for e in k[which]["errors"]]
    seen = {error.split(" (Request ID")[0][:80] for error in all_errors}
    return [f"errors: {' | '.join(sorted(seen))}"] if seen else []
