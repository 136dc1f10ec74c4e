"""How blocks are read in jobs, so that checksums and messages overlap with bytes.

While one job is read the lender computes the checksums of the next, and a thread here verifies the
one before.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from xxhash import xxh3_64_intdigest

from workers.errors import PeerLostError
from workers.peer import wire
from workers.peer.session import Session

# Jobs that are asked for before they are read: the lender computes their checksums meanwhile.
AHEAD = 3

# Takes the indices of blocks that are in their rows, whole.
Land = Callable[[list[int]], None]
# A key, our row for its block, and the row's bytes.
Wanted = tuple[bytes, int, memoryview]


def fetch(
    session: Session,
    verifying: ThreadPoolExecutor,
    wanted: Sequence[Wanted],
    land: Land,
    deadline_s: float,
) -> int:
    """Read blocks into their rows and `land` each that is whole; how many came damaged. What the
    lender has no more does not come.

    Raises PeerLostError where that does not end by the deadline: what has landed is whole, and
    bytes may come into the other rows until the session is closed.
    """
    jobs = [
        range(at, min(at + session.job_rows, len(wanted)))
        for at in range(0, len(wanted), session.job_rows)
    ]
    numbers: list[int] = []

    def ask(job: range) -> None:
        numbers.append(session.number())
        keys = tuple(wanted[index][0] for index in job)
        # The lender counts from later on: what ends by the deadline has ended before its lease.
        session.tell(wire.Get(numbers[-1], keys, deadline_s - time.monotonic()))

    damaged = 0
    before: Future[int] | None = None
    for at, job in enumerate(jobs):
        for following in jobs[len(numbers) : at + 1 + AHEAD]:
            ask(following)
        lent = _lent(session, numbers[at], len(job), deadline_s)
        there = [(index, place) for index, place in zip(job, lent, strict=True) if place]
        session.read([(wanted[index][1], place.row) for index, place in there], deadline_s)
        session.tell(wire.Done(numbers[at]))
        damaged += before.result() if before is not None else 0
        told = [(index, wanted[index][2], place.checksum) for index, place in there]
        before = verifying.submit(_landed, told, land)
    return damaged + (before.result() if before is not None else 0)


def _lent(
    session: Session, number: int, count: int, deadline_s: float
) -> tuple[wire.Place | None, ...]:
    places = session.answer(wire.Lent, number, deadline_s).places
    if len(places) != count:
        raise PeerLostError(session.address, f"{len(places)} places for {count} blocks")
    return places


def _landed(told: Sequence[tuple[int, memoryview, int]], land: Land) -> int:
    """How many were damaged."""
    whole = [index for index, row, checksum in told if xxh3_64_intdigest(row) == checksum]
    land(whole)
    return len(told) - len(whole)
