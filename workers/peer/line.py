"""One peer as a reader sees it: a thread that asks it one thing after the other, and a pause after
it failed.

A peer that does not answer, or not by a deadline, counts as having nothing for a while: each
request would otherwise wait for it anew. One line of the log says so.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from workers.errors import PeerLostError
from workers.peer.session import Session

logger = logging.getLogger(__name__)

# The pause after a failure: doubled from the first to the second while failures go on.
REST_S, REST_MOST_S = 0.5, 30.0
# A connection that nobody uses ends, with its memory.
IDLE_S = 300.0


class Job(Protocol):
    """What is asked of a peer. `run` and `fail` are called on the line's thread, one of them
    exactly once, unless the job is `over` by then."""

    @property
    def deadline_s(self) -> float: ...

    def over(self) -> bool: ...

    def run(self, session: Session) -> None: ...

    def fail(self) -> None: ...


class Line:
    """See the module. `connect` makes a session by a deadline."""

    def __init__(self, address: str, connect: Callable[[float], Session]) -> None:
        self.address = address
        self._connect = connect
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._state = threading.Lock()
        self._running = self._closed = False
        self._again_s, self._rest_s = 0.0, REST_S

    @property
    def resting(self) -> bool:
        """Whether the peer failed a short while ago."""
        return time.monotonic() < self._again_s

    def submit(self, job: Job) -> None:
        """Have a job done when those before it are; never waits."""
        with self._state:
            if self._closed:
                return
            self._jobs.put(job)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="peer-fetch", daemon=True).start()

    def rest(self, complaint: str) -> None:
        """The peer failed: leave it alone for a while. From any thread."""
        with self._state:
            if self.resting or self._closed:
                return
            self._again_s = time.monotonic() + self._rest_s
            pause_s, self._rest_s = self._rest_s, min(2 * self._rest_s, REST_MOST_S)
        words = "peer %s: %s; what it has is computed here, and it is not asked for %.1f s"
        logger.warning(words, self.address, complaint, pause_s)

    def close(self) -> None:
        """End the connection once the job that runs has ended."""
        with self._state:
            self._closed = True
            self._jobs.put(None)

    # ------------------------------------------------------------------ the line's thread

    def _run(self) -> None:
        session: Session | None = None
        while (job := self._next()) is not None:
            session = self._attempt(job, session)
        if session is not None:
            session.close()

    def _next(self) -> Job | None:
        """The next job; None to end."""
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                job = None
                with self._state:
                    if self._jobs.empty():
                        self._running = False
                        return None
            if self._closed:
                return None
            if job is not None:
                return job

    def _attempt(self, job: Job, session: Session | None) -> Session | None:
        """The session that is left."""
        if job.over():
            return session
        if self.resting:
            job.fail()
            return session
        try:
            if session is None:
                session = self._connect(job.deadline_s)
            job.run(session)
        except Exception as error:  # the thread's edge; NIXL may refuse to make an agent too
            self.rest(error.complaint if isinstance(error, PeerLostError) else repr(error))
            # First, since bytes may still come into the job's rows.
            if session is not None:
                session.close()
            job.fail()
            return None
        self._rest_s = REST_S
        return session
