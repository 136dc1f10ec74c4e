"""Memory that NIXL can reach, and the agent that moves bytes between two such regions.

One agent for each region, so that a transfer that cannot be ended takes nothing with it but its own
region: RDMA may still write into memory after its transfer was given up. Not for several threads at
once.
"""

import importlib
import mmap
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from kv.errors import VaultLostError
from workers import connector

READ, WRITE = "READ", "WRITE"
# Between looks at a transfer: the first are for small ones, which take some 10 us; then a share of
# the time that it has taken already. Looks cost a core that somebody else computes with.
_EAGER_S = 0.0002
_PAUSE_S, _MOST_PAUSE_S, _PAUSE_SHARE = 0.00005, 0.002, 0.02


class Piece(NamedTuple):
    """Bytes to move: where they lie here, from the region's start, the address there, how many."""

    offset: int
    address: int
    n_bytes: int


class Region:
    """`n_bytes` of memory, zeros at first, registered with an agent of its own.

    One that `serves` can be reached by others: a thread of NIXL's looks for them every
    `connector.PROGRESS_DELAY_US`. Without, it only reaches others, and rests in between.
    """

    def __init__(self, n_bytes: int, serves: bool) -> None:
        # UCX reads the environment when it is loaded, and takes a while.
        nixl: Any = importlib.import_module("nixl._api")
        if serves:
            connector.calm_progress_thread()
        # Private: shared pages would count as files in memory.
        self._map = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(self._map)
        self.base = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        settings = nixl.nixl_agent_config(enable_prog_thread=serves, backends=["UCX"])
        self._agent: Any = nixl.nixl_agent(f"vault-{uuid.uuid4().hex}", settings)
        self._agent.register_memory([(self.base, n_bytes, 0, "")], mem_type="DRAM")
        # The transfer under way, or the one that was given up.
        self._handle: Any = None

    @property
    def metadata(self) -> bytes:
        """What another agent needs to reach this region."""
        found: bytes = self._agent.get_agent_metadata()
        return found

    def meet(self, metadata: bytes) -> str:
        """Another agent's name, by its metadata. Raises VaultLostError for what is none."""
        try:
            name: Any = self._agent.add_remote_agent(metadata)
        except Exception as error:  # NIXL's errors have no common base that it exports
            raise _failed("its agent is not understood", error) from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def move(
        self, direction: str, peer: str, pieces: Sequence[Piece], ended: Callable[[], bool]
    ) -> None:
        """READ from a peer, or WRITE to it, as one job.

        Raises VaultLostError where that fails, or `ended` says to give up: this region must then
        be closed, since bytes may still arrive.
        """
        if not pieces:
            return
        if ended():
            raise VaultLostError("vault transfer", f"{direction}: no time left", "ask earlier")
        try:
            self._handle = self._agent.initialize_xfer(direction, *self._lists(pieces), peer, b"")
            state = self._agent.transfer(self._handle)
            begun = time.monotonic()
            while state == "PROC" and not ended():
                time.sleep(_pause_s(time.monotonic() - begun))
                state = self._agent.check_xfer_state(self._handle)
            if state == "DONE":
                self._handle.release()
        except Exception as error:  # NIXL's errors have no common base that it exports
            # Its frames would hold the transfer, which must end with this region.
            bare = error.with_traceback(None)
            raise _failed(f"{direction} of {len(pieces)} pieces", bare) from bare
        if state != "DONE":
            raise VaultLostError(
                "vault transfer",
                f"{direction} of {sum(piece.n_bytes for piece in pieces)} bytes ended as {state}",
                "look at the shard and its network",
            )
        self._handle = None

    def close(self) -> None:
        """Let go of what is under way, the agent and the memory, in this order."""
        self._handle = None
        self._agent = None
        # Views that a caller has kept keep the memory too.
        with suppress(BufferError):
            self.memory.release()
            self._map.close()

    def _lists(self, pieces: Sequence[Piece]) -> tuple[Any, Any]:
        here = [(self.base + offset, n_bytes, 0) for offset, _, n_bytes in pieces]
        there = [(address, n_bytes, 0) for _, address, n_bytes in pieces]
        agent = self._agent
        return agent.get_xfer_descs(here, "DRAM"), agent.get_xfer_descs(there, "DRAM")


def _pause_s(taken_s: float) -> float:
    """Until the next look at a transfer that has taken so long."""
    if taken_s < _EAGER_S:
        return 0.0
    return min(_MOST_PAUSE_S, max(_PAUSE_S, _PAUSE_SHARE * taken_s))


def _failed(doing: str, error: Exception) -> VaultLostError:
    return VaultLostError("vault transfer", f"{doing}: {error}", "look at the shard")
