"""Seconds of requests, told by a scheduler's calls."""

from types import SimpleNamespace
from typing import Any

from workers.messages import Sources, Spent
from workers.stopwatch import Stopwatch

TOKEN_BYTES = 100


class Scheduler:
    """One whose steps are told what they take up; its clock stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 10.0
        self.matches: dict[str, int | None] = {}
        self.takes: dict[str, int] = {}
        self.old: set[str] = set()
        self.requests = dict.fromkeys("abc")
        self.connector = SimpleNamespace(
            get_num_new_matched_tokens=lambda request, _: (self.matches[request.request_id], True),
            update_state_after_alloc=lambda request, blocks, tokens: None,
        )
        self.watch = Stopwatch(self, TOKEN_BYTES, lambda: self.now_s)

    def schedule(self, *_: Any) -> Any:
        new = [SimpleNamespace(req_id=name) for name in self.takes if name not in self.old]
        self.old |= set(self.takes)
        return SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=dict(self.takes))

    def step(self, seconds: float, **takes: int) -> None:
        """A step that computes so many tokens of each request."""
        self.takes = takes
        self.schedule(False)
        self.now_s += seconds

    def match(self, name: str, tokens: int | None) -> None:
        self.matches[name] = tokens
        found = self.connector.get_num_new_matched_tokens(SimpleNamespace(request_id=name), 0)
        assert found == (tokens, True)

    def allocate(self, name: str, tokens: int) -> None:
        request = SimpleNamespace(request_id=name)
        self.connector.update_state_after_alloc(request, None, tokens)


def test_a_prompt_that_waits_and_is_computed() -> None:
    """From its arrival, which may be before the scheduler knew it, over all steps that it took."""
    engine = Scheduler()
    engine.watch.arrived("a", 9.0)
    engine.now_s = 12.0
    engine.allocate("a", 0)
    engine.step(2.0, a=64)
    engine.step(1.0, a=36)
    assert engine.watch.spent("a", Sources(100, 100, 0, 0)) == Spent(3.0, 0.0, 3.0)


def test_a_handoff_is_loading_until_the_request_runs() -> None:
    """And what is handed off is counted in bytes of the paged KV."""
    engine = Scheduler()
    engine.watch.arrived("a", 10.0)
    engine.now_s = 11.0
    engine.match("a", 90)
    engine.allocate("a", 90)
    engine.now_s = 15.0
    engine.allocate("a", 0)
    engine.step(0.5, a=1)
    assert engine.watch.spent("a", Sources(100, 0, 10, 90)) == Spent(1.0, 4.0, 0.5, 9000)


def test_a_promotion_is_loading_from_when_tiers_were_asked() -> None:
    """Blocks come into host memory first, and the scheduler asks again and again meanwhile."""
    engine = Scheduler()
    engine.watch.arrived("a", 10.0)
    for tokens in (None, None, 64):
        engine.now_s += 1.0
        engine.match("a", tokens)
    engine.allocate("a", 64)
    engine.now_s += 1.0
    engine.step(2.0, a=36)
    spent = engine.watch.spent("a", Sources(100, 36, 0, 0, disk_tokens=64))
    assert spent == Spent(1.0, 3.0, 2.0, 6400)


def test_other_prompts_are_counted_while_a_request_computes() -> None:
    """Of its own tokens and of streams beside it, which have one token a step, none are."""
    engine = Scheduler()
    engine.step(1.0, earlier=500)
    engine.watch.arrived("a", engine.now_s)
    engine.step(1.0, a=80, b=40, stream=1)
    engine.step(1.0, a=20, stream=1)
    spent = engine.watch.spent("a", Sources(100, 100, 0, 0))
    assert spent == Spent(0.0, 0.0, 2.0, others_tokens=40)


def test_other_prompts_are_counted_while_a_request_loads() -> None:
    """They hold up when it is noticed that the load is there."""
    engine = Scheduler()
    engine.watch.arrived("a", 10.0)
    engine.allocate("a", 90)
    engine.step(3.0, b=300)
    engine.step(0.5, a=10)
    spent = engine.watch.spent("a", Sources(100, 10, 0, 90))
    assert spent == Spent(0.0, 3.0, 0.5, 9000, others_tokens=300)


def test_who_was_not_told_of_spent_nothing() -> None:
    """Probes run past the watch; a request's seconds are told once."""
    engine = Scheduler()
    engine.step(1.0, probe=32)
    assert engine.watch.spent("probe", Sources(32, 32, 0, 0)) is None
    engine.watch.arrived("a", 10.0)
    engine.step(1.0, a=32)
    assert engine.watch.spent("a", Sources(32, 32, 0, 0)) is not None
    assert engine.watch.spent("a", Sources(32, 32, 0, 0)) is None


def test_requests_that_end_unheard_are_forgotten() -> None:
    """Those that were aborted before their first token do not pile up."""
    engine = Scheduler()
    for number in range(20_000):
        engine.watch.arrived(f"aborted-{number}", 0.0)
    assert len(engine.watch._times) <= 10_000


def test_loads_that_overlap_are_beside_each_other() -> None:
    """Each of them, also the one that was there first; not one that came when it was over, nor
    one beside a request that was given up."""
    engine = Scheduler()
    for name in "abc":
        engine.watch.arrived(name, 9.0)
    for name in "ab":
        engine.match(name, None)
        engine.now_s += 1.0
    engine.step(1.0, a=5, b=5)
    sources = Sources(100, 5, 0, 0)
    assert engine.watch.spent("a", sources).beside  # type: ignore[union-attr]
    engine.match("c", None)
    engine.step(1.0, c=5)
    assert engine.watch.spent("b", sources).beside  # type: ignore[union-attr]
    assert not engine.watch.spent("c", sources).beside  # type: ignore[union-attr]
    engine = Scheduler()
    for name in "ab":
        engine.watch.arrived(name, 9.0)
    engine.match("a", None)
    del engine.requests["a"]
    engine.match("b", None)
    engine.step(1.0, b=5)
    assert not engine.watch.spent("b", sources).beside  # type: ignore[union-attr]
