"""Whether one more request may enter."""

from collections.abc import Iterator
from contextlib import contextmanager

from router.errors import OverloadedError, TooManyError


class Admission:
    """Counts the requests in flight and refuses those past the limit, at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def check(self, n: int = 1) -> None:
        """Raise `OverloadedError` if `n` more would not fit now, `TooManyError` if ever."""
        if n > self._limit:
            raise TooManyError(n, self._limit)
        if self.held + n > self._limit:
            raise OverloadedError(self.held, self._limit)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place for the length of a request."""
        self.check()
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
