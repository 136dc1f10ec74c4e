"""Waiting for what another process is about to do; a wait always ends."""

import time
from collections.abc import Callable
from typing import Any


def await_that(
    holds: Callable[[], Any], what: str, timeout_s: float = 10.0, every_s: float = 0.01
) -> Any:
    """What `holds` gives once it gives something true; AssertionError if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return found
