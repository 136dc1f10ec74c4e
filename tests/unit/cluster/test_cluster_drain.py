"""Waiting for a node to be empty, in virtual time."""

import pytest

from cluster.drain import await_gone


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("gone_s", "left", "took_s"), [(0.0, [], 0.0), (3.2, [], 3.5), (99.0, ["decode:x"], 10.0)]
)
def test_it_ends_when_nothing_runs_or_time_is_up(
    gone_s: float, left: list[str], took_s: float
) -> None:
    """No later than the next look after either; what is left is named."""
    clock = _Clock()
    running = lambda: ["decode:x"] if clock.now_s < gone_s else []  # noqa: E731
    assert await_gone(running, 10.0, clock.now, clock.sleep) == left
    assert clock.now_s == took_s
