"""A replica's host tier as other replicas read it over NIXL."""

import importlib
import uuid
from typing import Any

import numpy as np

from workers import connector


class Window:
    """Memory of somebody else's, registered with an agent of its own that serves reads of it.

    A thread of NIXL's looks for them every `connector.PROGRESS_DELAY_US`, outside the GIL. To be
    closed before the memory is unmapped.
    """

    def __init__(self, memory: memoryview) -> None:
        # UCX reads the environment when it is loaded, and takes a while.
        nixl: Any = importlib.import_module("nixl._api")
        connector.calm_progress_thread()
        flat = np.frombuffer(memory, np.uint8)
        self.base = int(flat.ctypes.data)
        settings = nixl.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
        self._agent: Any = nixl.nixl_agent(f"peer-{uuid.uuid4().hex}", settings)
        region = [(self.base, flat.nbytes, 0, "")]
        self._registered: Any = self._agent.register_memory(region, mem_type="DRAM")

    @property
    def metadata(self) -> bytes:
        """What another agent needs to reach the memory."""
        found: bytes = self._agent.get_agent_metadata()
        return found

    def close(self) -> None:
        """Nobody reads the memory any more."""
        if self._agent is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = self._agent = None
