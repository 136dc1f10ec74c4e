"""Whether one more request may enter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router.context import Notes
from router.errors import OverloadedError, RouterError, TooManyError


class Admission:
    """Counts the requests in flight and refuses those past the limit, at once.

    A call reserves places for its requests while it can still be refused with a status: they
    begin later, once the prompt is tokenized, and for a stream behind the start of its response.
    """

    def __init__(
        self, limit: int, full: Callable[[int, int], RouterError] = OverloadedError
    ) -> None:
        self._limit, self._full = limit, full
        self.held = 0

    def check(self, n: int = 1) -> None:
        """Raise the error of a `full` house if `n` more would not fit now, `TooManyError` if
        ever."""
        if n > self._limit:
            raise TooManyError(n, self._limit)
        if self.held + n > self._limit:
            raise self._full(self.held, self._limit)

    def reserve(self, n: int, notes: Notes) -> None:
        """Keep `n` places for the call of `notes` until `release`; raises as `check` does."""
        more = n - notes.reserved
        if more > 0:
            self.check(more if n <= self._limit else n)
            self.held += more
            notes.reserved += more

    def release(self, notes: Notes) -> None:
        """The call has ended: give back the places that no request of it took."""
        self.held -= notes.reserved
        notes.reserved = 0

    @contextmanager
    def admit(self, notes: Notes | None = None) -> Iterator[None]:
        """Hold a place for the length of a request: one that its call reserved, or a new one."""
        if notes is not None and notes.reserved:
            notes.reserved -= 1
        else:
            self.check()
            self.held += 1
        try:
            yield
        finally:
            self.held -= 1
