"""A tiered engine whose peer tier fails when a test wants it to (`tiered_engine.py`)."""

import os
import signal
import time
from typing import Any

from tests.flow.tiered_engine import Bench, TieredEngine, main


class PeeringEngine(TieredEngine):
    """The process, seen from a test."""

    program = __file__


class PeeringBench(Bench):
    """In the process."""

    def die(self, number: str, at_get: int) -> None:
        """Send itself a signal as the peer asks for blocks for this time, counted from 1."""
        server = self._peers.server
        lend, seen = server._lend, iter(range(1, 1_000_000))

        def counted(*args: Any) -> None:
            if next(seen) == at_get:
                os.kill(os.getpid(), signal.Signals[number])
                time.sleep(0.1)  # this thread may go on for a moment
            lend(*args)

        server._lend = counted

    def die_reading(self) -> None:
        """End at once as blocks that were lent to it are read for the first time."""
        from workers.peer.session import Session

        def read(*_: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        Session.read = read  # type: ignore[method-assign]

    def corrupt(self, nth: int) -> None:
        """Change a byte of the nth block lent from now on, after its checksum was taken."""
        server = self._peers.server
        place, seen = server._place, iter(range(1_000_000))

        def corrupted(row: int) -> Any:
            told = place(row)
            if next(seen) == nth:
                server._memory[row : row + 1].cast("B")[100] ^= 1
            return told

        server._place = corrupted

    def small_jobs(self, n_bytes: int) -> None:
        """Read blocks in jobs of so many bytes, over connections that are made from now on."""
        from workers.peer import session

        session.JOB_BYTES = n_bytes

    def rests(self, first_s: float) -> None:
        """How long a peer rests after its first failure, of those that are asked from now on."""
        from workers.peer import line

        line.REST_S = first_s

    def lending(self) -> dict[str, int]:
        """Loans that stand, blocks that are pinned by anybody, and bytes that were ever lent."""
        host = self.engine._tiers.primary_tier

        def pinned() -> int:
            return sum(chunk.ref_cnt != 0 for chunk in host._policy.chunks.values())

        server = self._peers.server
        return {
            "loans": server.loans,
            "lent": host.lent,
            "pinned": self._between_steps(pinned),
            "bytes": server.lent_bytes,
        }

    @property
    def _peers(self) -> Any:
        [tier] = [t for t in self.engine._tiers.secondary_tiers if hasattr(t, "server")]
        return tier


if __name__ == "__main__":
    main(PeeringBench)
