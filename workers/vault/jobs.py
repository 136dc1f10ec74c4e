"""How a client's blocks move in jobs, so that checksums and messages overlap with bytes.

While a client writes one job, the shard verifies the one before and makes room for the next; while
it reads one, a thread beside verifies the one before.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kv.codecs.frame import HEADER_BYTES, read_frame, told_checksum
from kv.errors import CodecError, VaultLostError
from kv.vault import wire
from kv.vault.arena import Extent
from kv.vault.orders import Outcome
from kv.vault.wire import Verdict
from workers.vault.line import Session
from workers.vault.region import READ, WRITE

logger = logging.getLogger(__name__)

# Nobody answered: whether it is stored is not known.
LOST = Verdict(Outcome.REFUSED, "lost")


class Batch(list[tuple[int, int]]):
    """The blocks of one job: the index of each, and its place in staging."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block to store: `fill` encodes its frame, of `n_bytes`, once there is room for it.

    `fill` may raise CodecError: the block is then not stored.
    """

    key: bytes
    parent: bytes | None
    n_bytes: int
    seconds_saved: float
    fill: Callable[[memoryview], None]
    ttl_s: float | None = None


@dataclass(slots=True)
class _Job:
    number: int
    batch: Batch
    sent_s: float
    written: tuple[int, ...] = ()  # indices whose verdict is to come


def put_all(
    session: Session,
    tenant: str,
    codec: str,
    blocks: Sequence[Block],
    batches: Iterable[Batch],
    verdicts: list[Verdict],
    deadline_s: float,
) -> None:
    """Put every batch, asking for room for one while the one before is written. Fills `verdicts`.

    Raises VaultLostError where that does not end in time.
    """

    def asked(batch: Batch) -> _Job:
        job = _Job(session.number(), batch, time.monotonic())
        offers = tuple(_offer(blocks[index]) for index, _ in batch)
        session.tell(wire.Put(job.number, tenant, codec, offers))
        return job

    jobs: list[_Job] = []
    for batch in batches:
        jobs.append(asked(batch))
        if len(jobs) > 1:
            _write(session, jobs[-2], blocks, verdicts, deadline_s)
    if jobs:
        _write(session, jobs[-1], blocks, verdicts, deadline_s)
    for job in jobs:
        if job.written:
            stored = session.answer(wire.Stored, job.number, deadline_s)
            for index, verdict in zip(job.written, stored.verdicts, strict=False):
                verdicts[index] = verdict


def read_all(
    session: Session,
    verifying: ThreadPoolExecutor,
    places: Sequence[wire.Place],
    sizes: Sequence[int],
    batches: Iterable[Batch],
    end_s: float,
) -> Iterator[tuple[int, memoryview | None]]:
    """Read what was lent, in order: each index with its frame, None where that is not what was
    told. A frame is there until the next but one batch is read: batches alternate in staging.

    Raises VaultLostError where that does not end by `end_s`.
    """
    before: Future[list[tuple[int, memoryview | None]]] | None = None
    for batch in batches:
        try:
            session.move(READ, [(offset, places[index].extents) for index, offset in batch], end_s)
        except VaultLostError:  # what came before is whole
            if before is not None:
                yield from before.result()
            raise
        frames = [
            (index, session.staging[offset : offset + sizes[index]], places[index].checksum)
            for index, offset in batch
        ]
        verified = verifying.submit(_verified, frames)
        # The one before was verified while this one came; it is used before the next takes its
        # place.
        if before is not None:
            yield from before.result()
        before = verified
    if before is not None:
        yield from before.result()


def _write(
    session: Session,
    job: _Job,
    blocks: Sequence[Block],
    verdicts: list[Verdict],
    deadline_s: float,
) -> None:
    """Write what is granted, and say so; the shard's verdict on that is asked for later."""
    granted = session.answer(wire.Granted, job.number, deadline_s)
    if len(granted.verdicts) != len(job.batch):
        raise VaultLostError("vault shard", f"{len(granted.verdicts)} verdicts", "report it")
    writing: list[tuple[int, int, tuple[Extent, ...]]] = []
    for (index, offset), verdict in zip(job.batch, granted.verdicts, strict=True):
        if verdict.outcome is Outcome.WRITE:
            writing.append((index, offset, verdict.extents))
        else:
            verdicts[index] = verdict
    if not writing:
        return
    checksums = tuple(_filled(session, blocks[index], offset) for index, offset, _ in writing)
    parts = [
        (offset, extents)
        for told, (_, offset, extents) in zip(checksums, writing, strict=True)
        if told is not None
    ]
    # The shard counts from later on: what ends by this has ended before its grant.
    session.move(WRITE, parts, min(deadline_s, job.sent_s + granted.write_s))
    session.tell(wire.Written(job.number, checksums))
    job.written = tuple(index for index, _, _ in writing)


def _offer(block: Block) -> wire.Offer:
    return wire.Offer(block.key, block.parent, block.n_bytes, block.seconds_saved, block.ttl_s)


def _filled(session: Session, block: Block, offset: int) -> int | None:
    """Encode a frame into staging; its checksum, None where that is refused."""
    frame = session.staging[offset : offset + block.n_bytes]
    # A frame that was there before is none any more.
    frame[:HEADER_BYTES] = bytes(HEADER_BYTES)
    try:
        block.fill(frame)
    except CodecError as error:
        logger.warning("block %s not stored: %s", block.key.hex(), error)
        return None
    return told_checksum(frame)


def _verified(
    frames: Iterable[tuple[int, memoryview, int]],
) -> list[tuple[int, memoryview | None]]:
    return [(index, frame if _whole(frame, told) else None) for index, frame, told in frames]


def _whole(frame: memoryview, checksum: int) -> bool:
    """Whether it is the frame that was told, and not another one that is whole as well."""
    try:
        read_frame(frame)
    except CodecError:
        return False
    return told_checksum(frame) == checksum
