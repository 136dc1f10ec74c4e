"""Host tiers as NIXL knows them: one that is read by others, and one that blocks are read into."""

import importlib
import uuid
from typing import Any

import numpy as np

from workers import connector
from workers.vault.region import Region


class Window(Region):
    """Memory of somebody else's, of (rows, row bytes), registered with an agent of its own.

    One that `serves` is read by others: a thread of NIXL's looks for them every
    `connector.PROGRESS_DELAY_US`, outside the GIL. Without, it only reads others. To be closed
    before the memory is unmapped; once it is, nothing is written there any more.
    """

    def __init__(self, memory: memoryview, serves: bool) -> None:
        # UCX reads the environment when it is loaded, and takes a while.
        nixl: Any = importlib.import_module("nixl._api")
        if serves:
            connector.calm_progress_thread()
        self.memory = memory[:]
        flat = np.frombuffer(memory, np.uint8)
        self.base = int(flat.ctypes.data)
        settings = nixl.nixl_agent_config(enable_prog_thread=serves, backends=["UCX"])
        self._agent: Any = nixl.nixl_agent(f"peer-{uuid.uuid4().hex}", settings)
        self._agent.register_memory([(self.base, flat.nbytes, 0, "")], mem_type="DRAM")
        self._handle: Any = None

    def close(self) -> None:
        """Let go of what is under way, the agent and the memory, in this order."""
        self._handle = None
        self._agent = None
        self.memory.release()
