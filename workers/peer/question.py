"""What one request wants to know of its peer: which blocks it has, or will have.

The head of a split is computed by the peer while it is asked for, under the id of the request that
asks. Until the peer says that it has ended, what is not there is on its way: it is asked for again
and again, so that a peer that died or hangs is noticed as with any other question.
"""

import time

from workers.errors import PeerLostError
from workers.peer import wire
from workers.peer.line import Line
from workers.peer.session import Session

# Blocks that are on their way are asked for so often. A step of the engine that computes them
# takes longer, and the question and its answer about a millisecond.
ASK_AGAIN_S = 0.02
# Of those, so many at a time: they come in order.
_AHEAD_KEYS = 256


class Question:
    """One request's; `work` names what the peer computes for it, and is empty where it does not.

    It ends `timeout_s` after the first look; each exchange with the peer ends after `answer_s`.
    """

    def __init__(self, line: Line, timeout_s: float, answer_s: float, work: str = "") -> None:
        self.line, self.work = line, work
        self._timeout_s, self._answer_s = timeout_s, answer_s
        self._deadline_s: float | None = None
        self.answers: dict[bytes, bool | None] = {}
        self.unsent: list[bytes] = []
        self.failed = False
        self._coming: list[bytes] = []
        self._again_s = 0.0

    @property
    def deadline_s(self) -> float:
        """By when what is asked for now must be there. The request's own time runs from its first
        look: it may have queued before."""
        now_s = time.monotonic()
        if self._deadline_s is None:
            self._deadline_s = now_s + self._timeout_s
        return min(self._deadline_s, now_s + self._answer_s)

    @property
    def answer_by_s(self) -> float:
        """By when the peer must have answered what it is asked now, or it has failed. That nobody
        waits for its work any more is no failing of its: what is under way as that time ends may
        take as long as any."""
        return time.monotonic() + self._answer_s if self.work else self.deadline_s

    def look(self, key: bytes) -> bool | None:
        """Whether the peer has a block; None while it has not said, or computes it."""
        if self.line.resting:
            self.failed = True
        elif key not in self.answers:
            self.answers[key] = None
            self.unsent.append(key)
        here, now_s = self.answers.get(key), time.monotonic()
        if now_s >= self.deadline_s:
            self.failed = True
            if here is None and not self.work:
                self.line.rest("no answer in time")
        if self._coming and now_s >= self._again_s:
            self.unsent, self._coming = self._coming + self.unsent, []
        return False if self.failed else here

    def wait_for(self, keys: list[bytes]) -> None:
        """These are on their way. On the line's thread, while no other question is under way."""
        self._again_s = time.monotonic() + ASK_AGAIN_S
        self._coming = keys


class Finding:
    """The job of asking which blocks a peer has."""

    def __init__(self, question: Question, keys: list[bytes]) -> None:
        self._question, self._keys = question, keys

    @property
    def deadline_s(self) -> float:
        """Of the exchange that is under way, or comes next."""
        return self._question.answer_by_s

    def over(self) -> bool:
        return self._question.failed

    def run(self, session: Session) -> None:
        question, left = self._question, self._keys
        most = _AHEAD_KEYS if question.work else wire.MOST_KEYS
        coming: list[bytes] = []
        while left and not coming:
            keys, left = left[:most], left[most:]
            found = self._ask(session, tuple(keys))
            told = dict(zip(keys, found.here, strict=True))
            if question.work and not found.ended:
                coming = [key for key, here in told.items() if not here]
                told = {key: True for key, here in told.items() if here}
            # At once: what is not answered is asked for meanwhile.
            question.answers.update(told)
        if coming:
            question.wait_for(coming + left)

    def fail(self) -> None:
        self._question.failed = True

    def _ask(self, session: Session, keys: tuple[bytes, ...]) -> wire.Found:
        number = session.number()
        session.tell(wire.Find(number, keys, self._question.work))
        found = session.answer(wire.Found, number, self.deadline_s)
        if len(found.here) != len(keys):
            lacking = f"{len(found.here)} answers for {len(keys)} blocks"
            raise PeerLostError(session.address, lacking)
        return found
