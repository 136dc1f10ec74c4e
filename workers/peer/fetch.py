"""How blocks are read in jobs, so that checksums and messages overlap with bytes.

While one job is read the lender computes the checksums of the next, and a thread here verifies the
one before and hands its blocks on.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from xxhash import xxh3_64_intdigest

from workers.errors import PeerLostError
from workers.peer import wire
from workers.peer.session import Session

# Takes the index of a block and its bytes, which are whole, and are the caller's until it returns.
Land = Callable[[int, memoryview], None]


def fetch(
    session: Session,
    verifying: ThreadPoolExecutor,
    keys: Sequence[bytes],
    land: Land,
    deadline_s: float,
) -> int:
    """Read blocks and `land` each that is whole; how many came damaged. What the lender has no
    more does not come.

    Raises PeerLostError where that does not end by the deadline; what has landed is whole.
    """
    jobs = [
        range(at, min(at + session.job_rows, len(keys)))
        for at in range(0, len(keys), session.job_rows)
    ]
    numbers: list[int] = []

    def ask(job: range) -> None:
        numbers.append(session.number())
        wanted = tuple(keys[index] for index in job)
        # The lender counts from later on: what ends by the deadline has ended before its lease.
        session.tell(wire.Get(numbers[-1], wanted, deadline_s - time.monotonic()))

    damaged = 0
    before: Future[int] | None = None
    for at, job in enumerate(jobs):
        if at == 0:
            ask(job)
        if at + 1 < len(jobs):
            ask(jobs[at + 1])
        lent = _lent(session, numbers[at], len(job), deadline_s)
        there = [(index, place) for index, place in zip(job, lent, strict=True) if place]
        frames = session.read(at % 2, [place.row for _, place in there], deadline_s)
        session.tell(wire.Done(numbers[at]))
        # The one before is done with its half before the next job takes it.
        damaged += before.result() if before is not None else 0
        before = verifying.submit(_landed, there, frames, land)
    return damaged + (before.result() if before is not None else 0)


def _lent(
    session: Session, number: int, count: int, deadline_s: float
) -> tuple[wire.Place | None, ...]:
    places = session.answer(wire.Lent, number, deadline_s).places
    if len(places) != count:
        raise PeerLostError(session.address, f"{len(places)} places for {count} blocks")
    return places


def _landed(
    there: Sequence[tuple[int, wire.Place]], frames: Sequence[memoryview], land: Land
) -> int:
    """How many were damaged."""
    damaged = 0
    for (index, place), frame in zip(there, frames, strict=True):
        if xxh3_64_intdigest(frame) == place.checksum:
            land(index, frame)
        else:
            damaged += 1
    return damaged
