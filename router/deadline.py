"""The time that a request may take.

`asyncio.timeout` cannot be used: the pipeline is an async generator, and its consumer must not be
inside the block. So the task is cancelled with a word by which the pipeline knows its own timer.
"""

import asyncio

from router.context import RequestContext
from router.errors import DeadlineError

LATE = "deadline"


class Deadline:
    """Cancels the task that made it once the request's time is over, of which `spent_s` are gone;
    `stop` ends the watch."""

    def __init__(self, context: RequestContext, spent_s: float = 0.0) -> None:
        self._context, self._task = context, asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        if context.timeout_s is not None and self._task is not None:
            loop = asyncio.get_running_loop()
            left_s = context.timeout_s - spent_s
            self._timer = loop.call_later(max(0.0, left_s), self._task.cancel, LATE)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def check(self, outcome: str) -> None:
        """Raise `DeadlineError` if `outcome`, the word of a cancellation, is our timer's."""
        if outcome == LATE and self._task is not None and self._context.timeout_s is not None:
            self._task.uncancel()
            raise DeadlineError(self._context.request_id, self._context.timeout_s)
