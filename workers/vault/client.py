"""A vault as its clients see it: put and get over all shards, misses instead of errors.

For the threads of a worker's pool: no event loop, every call ends by its deadline, and a shard that
is dead, slow or restarted is one that has nothing. Blocks of one run, a prompt's or a part of it,
lie on one shard (`kv.placement`), so that one question finds them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import msgspec
import zmq

from kv.errors import CodecError, VaultError, VaultLostError
from kv.placement import place
from kv.vault import wire
from kv.vault.wire import Verdict
from workers import curve
from workers.vault.jobs import LOST, Batch, Block, put_all, read_all
from workers.vault.line import Line, Session, in_background

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
# Bytes of one NIXL job: large enough for its speed, and while one moves the last is verified.
JOB_BYTES = 4 << 20
_ALIGN_BYTES = 64
_Answer = TypeVar("_Answer")


class ShardSeat(msgspec.Struct, frozen=True):
    """Where a shard can be reached, None while that is not known; and its share of the blocks
    against others'."""

    address: str | None = None
    weight: float = 1.0


# What is done with a frame: its key and its bytes, which are whole, and which are the caller's
# until it returns. A CodecError makes the block a miss.
Take = Callable[[bytes, memoryview], None]


class VaultClient:
    """See the module. `staging_bytes` of memory for each shard; a frame larger than half of it
    is a miss. With none it asks and moves no blocks.

    Raises VaultError for no shards, or weights that are not above 0.
    """

    def __init__(
        self,
        shards: Mapping[str, ShardSeat],
        keys: curve.ClientKeys,
        fingerprint: str,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._weights = {name: seat.weight for name, seat in shards.items()}
        place(b"", self._weights)
        self._keys, self._fingerprint = keys, fingerprint
        self._staging_bytes = staging_bytes
        self._verifying = ThreadPoolExecutor(1, thread_name_prefix="vault-verify")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._addresses: dict[str, str] = {}
        self._lines: dict[str, Line] = {}
        for name, seat in shards.items():
            if seat.address is not None:
                self.move(name, seat.address)

    def move(self, name: str, address: str) -> None:
        """From now on the shard of this name is reached there. Not for several threads at once.

        Raises VaultError for a shard that the client was not made with: blocks lie on those.
        """
        if name not in self._weights:
            raise VaultError(f"vault shard {name}", f"not among {[*self._weights]}", "restart")
        if self._addresses.get(name) == address:
            return
        connect = partial(
            Session, self._context, address, self._keys, self._fingerprint, self._staging_bytes
        )
        before = self._lines.get(name)
        self._addresses[name], self._lines[name] = address, Line(name, connect)
        if before is not None:
            # It may have to wait for a call that uses it.
            in_background("vault-close", before.close)

    def await_up(self, timeout_s: float) -> bool:
        """Whether all shards are connected, within this time. Until then they have nothing."""
        deadline_s = time.monotonic() + timeout_s
        lines = self._lines.values()
        up = all(line.await_up(deadline_s) for line in lines)
        return up and len(self._lines) == len(self._weights)

    def put(
        self, run: bytes, tenant: str, codec: str, blocks: Sequence[Block], timeout_s: float
    ) -> tuple[Verdict, ...]:
        """Store blocks of one run; what became of each. STORED ones are there to be read, and
        on disk where the shard has one."""
        deadline_s = time.monotonic() + timeout_s
        verdicts = [LOST] * len(blocks)
        try:
            with self._line(run).session(deadline_s) as session:
                batches = list(self._batches([block.n_bytes for block in blocks]))
                put_all(session, tenant, codec, blocks, batches, verdicts, deadline_s)
        except VaultLostError as error:
            logger.debug("put of %d blocks: %s", len(blocks), error)
        return tuple(verdicts)

    def get(
        self,
        run: bytes,
        keys: Sequence[bytes],
        take: Take,
        timeout_s: float,
        begun: Callable[[], None] = lambda: None,
    ) -> list[bytes]:
        """Give the leading blocks of one run to `take`, each as soon as it is here and whole;
        which those were. One that is found damaged is left out. `begun` is called once the shard's
        connection is this call's."""
        deadline_s = time.monotonic() + timeout_s
        taken: list[bytes] = []
        try:
            with self._line(run).session(deadline_s) as session:
                begun()
                for at in range(0, len(keys), wire.MOST_BLOCKS):
                    part = keys[at : at + wire.MOST_BLOCKS]
                    if self._get(session, part, take, taken, deadline_s) < len(part):
                        break
        except VaultLostError as error:
            logger.debug("get of %d blocks: %s", len(keys), error)
        return taken

    def has(self, runs: Mapping[bytes, Sequence[bytes]], timeout_s: float) -> frozenset[bytes]:
        """Which blocks of these runs are there, as far as their shards say so in time."""
        deadline_s = time.monotonic() + timeout_s
        by_shard: dict[str, list[bytes]] = {}
        for run, keys in runs.items():
            by_shard.setdefault(place(run, self._weights), []).extend(keys)
        found: list[bytes] = []
        for name, keys in by_shard.items():
            try:
                with self._named(name).session(deadline_s) as session:
                    found += _held(session, keys, deadline_s)
            except VaultLostError as error:
                logger.debug("question about %d blocks: %s", len(keys), error)
        return frozenset(found)

    def forget(self, tags: Iterable[str], timeout_s: float) -> dict[str, wire.Forgotten | None]:
        """Erase tenants on all shards: what each did; None for one that did not say."""
        asked = tuple(tags)
        return self._each(
            lambda session, number, deadline_s: session.ask(
                wire.Forget(number, asked), wire.Forgotten, deadline_s
            ),
            timeout_s,
        )

    def stats(self, timeout_s: float) -> dict[str, wire.Stats | None]:
        """What each shard holds; None for one that does not say."""
        return self._each(
            lambda session, number, deadline_s: session.ask(
                wire.Stat(number), wire.Stats, deadline_s
            ),
            timeout_s,
        )

    def close(self) -> None:
        """End all connections, once no call uses them."""
        for line in list(self._lines.values()):
            line.close()
        self._verifying.shutdown(wait=False)
        # It waits for sockets that are still being closed.
        in_background("vault-end", self._context.term)

    def _line(self, run: bytes) -> Line:
        return self._named(place(run, self._weights))

    def _named(self, name: str) -> Line:
        line = self._lines.get(name)
        if line is None:
            raise VaultLostError(f"vault {name}", "its address is not known", "wait")
        return line

    def _each(
        self, ask: Callable[[Session, int, float], _Answer], timeout_s: float
    ) -> dict[str, _Answer | None]:
        """Ask one shard after the other, each with its share of the time."""
        found: dict[str, _Answer | None] = {}
        for name in self._weights:
            deadline_s = time.monotonic() + timeout_s / len(self._weights)
            found[name] = None
            with suppress(VaultLostError), self._named(name).session(deadline_s) as session:
                found[name] = ask(session, session.number(), deadline_s)
        return found

    def _batches(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """Indices with their places in one half of staging; what is larger than that is left
        out. Halves alternate."""
        half_bytes = self._staging_bytes // 2
        start, batch, filled = 0, Batch(), 0
        for index, n_bytes in enumerate(sizes):
            if n_bytes > half_bytes:
                continue
            if batch and (
                filled + n_bytes > min(half_bytes, JOB_BYTES) or len(batch) == wire.MOST_BLOCKS
            ):
                yield batch
                start, batch, filled = half_bytes - start, Batch(), 0
            batch.append((index, start + filled))
            filled += -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if batch:
            yield batch

    def _get(
        self,
        session: Session,
        keys: Sequence[bytes],
        take: Take,
        taken: list[bytes],
        deadline_s: float,
    ) -> int:
        """How many were lent."""
        number, sent_s = session.number(), time.monotonic()
        wanted_s = max(0.0, deadline_s - sent_s)
        lent = session.ask(wire.Get(number, tuple(keys), wanted_s), wire.Lent, deadline_s)
        # The shard counts from later on: what ends by this has ended before its lease.
        end_s = min(deadline_s, sent_s + lent.lease_s)
        damaged: list[int] = []
        try:
            sizes = [sum(n_bytes for _, n_bytes in place.extents) for place in lent.places]
            reading = read_all(
                session, self._verifying, lent.places, sizes, self._batches(sizes), end_s
            )
            for index, frame in reading:
                if frame is None:
                    logger.warning("block %s came damaged", keys[index].hex())
                    damaged.append(index)
                elif _accepted(take, keys[index], frame):
                    taken.append(keys[index])
        finally:
            if lent.places:
                session.tell(wire.Done(number, tuple(damaged)))
        return len(lent.places)


def _held(session: Session, keys: Sequence[bytes], deadline_s: float) -> list[bytes]:
    """Those of the keys that a shard has; all questions are sent before the first answer is
    read."""
    parts: list[tuple[int, Sequence[bytes]]] = []
    for at in range(0, len(keys), wire.MOST_BLOCKS):
        parts.append((session.number(), keys[at : at + wire.MOST_BLOCKS]))
        session.tell(wire.Has(parts[-1][0], tuple(parts[-1][1])))
    found: list[bytes] = []
    for number, part in parts:
        held = session.answer(wire.Held, number, deadline_s).held
        found += [key for key, here in zip(part, held, strict=False) if here]
    return found


def _accepted(take: Take, key: bytes, frame: memoryview) -> bool:
    try:
        take(key, frame)
    except CodecError as error:
        logger.warning("block %s not used: %s", key.hex(), error)
        return False
    return True
