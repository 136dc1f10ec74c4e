"""The queue that a real engine tells."""

from pathlib import Path

from tests.flow.backlog_engine import run
from tests.flow.erasing_engine import PROMPT

BLOCK_TOKENS = 32


def test_what_is_cached_is_not_in_the_queue(tiny_model: Path) -> None:
    """A request that waits counts with what it lacks, before the scheduler has looked at it."""
    lacking = len(PROMPT) - len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
    assert run(tiny_model) == [len(PROMPT), lacking]
