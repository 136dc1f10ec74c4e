"""Who gives way in an engine's next step.

vLLM's priority scheduling (0.32) orders those that wait, and takes pages from the least urgent
when a request that runs lacks some. It does not touch one that runs for the sake of one that waits:
a long prompt that yields would take every step's tokens until it is computed, and urgent ones wait
for its seat and its pages too. So before each step it is decided here who stands still in it, how
many tokens it may have, and who goes back to those that wait.
"""

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    """What the decision was for."""

    NOBODY = "nobody"  # no urgent request needs what yielding ones have
    PROMPT = "prompt"  # an urgent prompt is computed: yielding prompts wait
    SEAT = "seat"  # an urgent request lacks a place among those that run
    PAGES = "pages"  # an urgent request lacks pages


@dataclass(frozen=True, slots=True)
class Running:
    """One request that runs.

    It would take `left_tokens` in a step without a limit; it `computes` a prompt unless it is a
    stream. `pages` are those that it holds, where it yields.
    """

    name: str
    yields: bool
    computes: bool
    left_tokens: int
    arrived_s: float
    pages: int


@dataclass(frozen=True, slots=True)
class Scene:
    """An engine between two steps.

    `waiting` urgent requests are ready for their turn, and could take `waiting_tokens` of the step;
    the first of them lacks `first_pages`. A step has `step_tokens` at most.
    """

    running: tuple[Running, ...]
    waiting: int
    waiting_tokens: int
    first_pages: int
    free_pages: int
    free_seats: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class Way:
    """How many tokens the step may have, who goes back to those that wait, in this order, and who
    runs and is `held`: it keeps its pages, and has no part in the step."""

    step_tokens: int
    preempted: tuple[str, ...]
    why: Why
    held: tuple[str, ...] = ()


def give_way(scene: Scene) -> Way:
    """What urgent requests need of this step, and a token for each yielding stream: beside a prompt
    that people wait for none that yields is computed."""
    urgent = [each for each in scene.running if not each.yields]
    preempted, why = _preempted(scene)
    if not scene.waiting_tokens and not any(each.computes for each in urgent):
        return Way(scene.step_tokens, preempted, why if preempted else Why.NOBODY)
    held = tuple(each.name for each in scene.running if each.yields and each.computes)
    streams = (each for each in scene.running if each.yields and not each.computes)
    tokens = scene.waiting_tokens + sum(each.left_tokens for each in urgent)
    tokens += sum(each.left_tokens for each in streams if each.name not in preempted)
    tokens = max(1, min(scene.step_tokens, tokens))
    return Way(tokens, preempted, why, tuple(name for name in held if name not in preempted))


def _preempted(scene: Scene) -> tuple[tuple[str, ...], Why]:
    """The youngest yielding requests, as many as free what the first urgent one lacks; nobody where
    all together do not."""
    lacked_pages = scene.first_pages - scene.free_pages if scene.waiting else 0
    lacked_seats = int(scene.waiting > 0 and scene.free_seats < 1)
    if lacked_pages <= 0 and not lacked_seats:
        return (), Why.PROMPT
    names: list[str] = []
    yielding = (each for each in scene.running if each.yields)
    for each in sorted(yielding, key=lambda each: each.arrived_s, reverse=True):
        if lacked_pages <= 0 and len(names) >= lacked_seats:
            break
        names.append(each.name)
        lacked_pages -= each.pages
    if lacked_pages > 0 or len(names) < lacked_seats:
        return (), Why.PROMPT
    return tuple(names), Why.SEAT if lacked_seats else Why.PAGES
