"""Everything the workers package raises.

WorkerError
├── EngineOptionError   an `engine:` option that vLLM refuses
├── EngineStartError    the engine could not start
├── EngineDeadError     the engine's step loop ended
├── MetricsPortError    an endpoint for metrics that cannot be opened
├── PeerLostError       another replica's host tier does not answer, or not in time
├── ReplicaLostError    a replica stopped answering while it held a request
└── WireError           bytes on the channel that are no message of ours
"""


class WorkerError(Exception):
    """Base of the tree; positional arguments only, so that each survives pickling."""


class EngineOptionError(WorkerError):
    """An engine option that vLLM does not know or does not accept."""

    def __init__(self, options: str, complaint: str) -> None:
        super().__init__(options, complaint)
        self.options, self.complaint = options, complaint

    def __str__(self) -> str:
        return f"engine options {self.options}: {self.complaint}; see `vllm serve --help` for names"


class EngineStartError(WorkerError):
    """The engine of one replica could not start."""

    def __init__(self, replica: str, complaint: str) -> None:
        super().__init__(replica, complaint)
        self.replica, self.complaint = replica, complaint

    def __str__(self) -> str:
        return f"{self.replica}: the engine did not start: {self.complaint}"


class EngineDeadError(WorkerError):
    """The step loop of one replica ended; nothing it held can go on there."""

    def __init__(self, replica: str, complaint: str) -> None:
        super().__init__(replica, complaint)
        self.replica, self.complaint = replica, complaint

    def __str__(self) -> str:
        return f"{self.replica}: the engine's step loop ended: {self.complaint}"


class MetricsPortError(WorkerError):
    """A process cannot answer Prometheus where it was told to."""

    def __init__(self, address: str, complaint: str) -> None:
        super().__init__(address, complaint)
        self.address, self.complaint = address, complaint

    def __str__(self) -> str:
        return (
            f"metrics at {self.address}: {self.complaint}; with metrics.port: null each process of "
            "a node takes a free port"
        )


class PeerLostError(WorkerError):
    """Another replica does not lend its blocks, or not in time; they are computed."""

    def __init__(self, address: str, complaint: str) -> None:
        super().__init__(address, complaint)
        self.address, self.complaint = address, complaint

    def __str__(self) -> str:
        return f"peer {self.address}: {self.complaint}"


class ReplicaLostError(WorkerError):
    """A replica went silent, left or refused while it held a request."""

    def __init__(self, replica: str, complaint: str) -> None:
        super().__init__(replica, complaint)
        self.replica, self.complaint = replica, complaint

    def __str__(self) -> str:
        return f"{self.replica}: {self.complaint}"


class WireError(WorkerError):
    """Bytes on the channel that are no message of this version."""

    def __init__(self, peer: str, complaint: str) -> None:
        super().__init__(peer, complaint)
        self.peer, self.complaint = peer, complaint

    def __str__(self) -> str:
        return f"{self.peer}: unreadable message ({self.complaint}); do both ends run one version?"
