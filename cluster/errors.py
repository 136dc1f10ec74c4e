"""Everything the cluster package raises.

ClusterError
├── ModelExportError    the default model could not be made
├── ConfigError         a configuration that cannot be used
├── ModelConfigError    a model's config.json that gives no KV size
├── StartError          the cluster did not come up
├── TlsError            a cluster answers with a certificate that is not its own
├── AdminKeyError       a cluster with keys was asked without the admin key
├── RestartError        replicas were not replaced in time
├── CodecRefusedError   a codec that this model may not use
├── PlotError           a picture that cannot be drawn
├── AuditFileError      an audit that cannot be read
├── UnknownRequestError a request that no audit has
├── BatchFileError      a file of requests or answers that is not a batch's
├── RefusedError        the cluster did not take an order
└── NotRunningError     a command needs a running cluster and found none

Messages say the subject, the numbers and the remedy. Constructors take positional
arguments only, so that an error survives pickling between processes.
"""


class ClusterError(Exception):
    """Any failure that this package reports."""


class ModelExportError(ClusterError):
    """The default model could not be downloaded, read or written."""


class ConfigError(ClusterError):
    """A configuration that cannot be read or used."""

    def __init__(self, source: str, complaint: str) -> None:
        super().__init__(source, complaint)
        self.source, self.complaint = source, complaint

    def __str__(self) -> str:
        return f"{self.source}: {self.complaint}; every key is explained in configs/cpu.yaml"


class ModelConfigError(ClusterError):
    """A model's config.json that cannot be read, or whose KV is not known."""

    def __init__(self, source: str, complaint: str) -> None:
        super().__init__(source, complaint)
        self.source, self.complaint = source, complaint

    def __str__(self) -> str:
        return f"{self.source}: {self.complaint}"


class StartError(ClusterError):
    """The cluster did not come up."""


class TlsError(ClusterError):
    """Whoever answers at a cluster's address does not prove to be it."""

    def __init__(self, address: str, complaint: str) -> None:
        super().__init__(address, complaint)
        self.address, self.complaint = address, complaint

    def __str__(self) -> str:
        return (
            f"{self.address}: TLS failed: {self.complaint}; the certificate that `serve` read at "
            "its start is wanted, restart the cluster if it was renewed"
        )


class AdminKeyError(ClusterError):
    """A cluster that has keys was asked without its admin key."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"{self.address} wants its admin key; set BREAKEVEN_ADMIN_KEY"


class RestartError(ClusterError):
    """A rolling restart did not come to its end."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names

    def __str__(self) -> str:
        left = ", ".join(self.names) or "none"
        return f"not replaced yet: {left}; Serve goes on trying, see `breakeven status`"


class CodecRefusedError(ClusterError):
    """A codec without a verdict that lets this model use it."""

    def __init__(self, codec: str, complaint: str, command: str) -> None:
        super().__init__(codec, complaint, command)
        self.codec, self.complaint, self.command = codec, complaint, command

    def __str__(self) -> str:
        return f"codec {self.codec}: {self.complaint}; `{self.command}` measures it"


class PlotError(ClusterError):
    """A picture cannot be drawn, or not where it was asked for."""

    def __init__(self, subject: str, complaint: str) -> None:
        super().__init__(subject, complaint)
        self.subject, self.complaint = subject, complaint

    def __str__(self) -> str:
        return f"{self.subject}: {self.complaint}"


class AuditFileError(ClusterError):
    """A file or folder of the audit that cannot be read."""

    def __init__(self, path: str, complaint: str) -> None:
        super().__init__(path, complaint)
        self.path, self.complaint = path, complaint

    def __str__(self) -> str:
        return f"{self.path}: {self.complaint}; `audit.path` is where the cluster writes its audit"


class UnknownRequestError(ClusterError):
    """No audit has a request of this id."""

    def __init__(self, request_id: str, searched: str) -> None:
        super().__init__(request_id, searched)
        self.request_id, self.searched = request_id, searched

    def __str__(self) -> str:
        return (
            f"no request {self.request_id!r} is known: {self.searched}; ids are in the response "
            "header x-request-id, and --file reads other audits"
        )


class BatchFileError(ClusterError):
    """A file that holds no batch's requests or answers, or cannot be used; line 0 is all of it."""

    def __init__(self, path: str, line: int, complaint: str) -> None:
        super().__init__(path, line, complaint)
        self.path, self.line, self.complaint = path, line, complaint

    def __str__(self) -> str:
        place = f"{self.path}, line {self.line}" if self.line else self.path
        return f"{place}: {self.complaint}"


class RefusedError(ClusterError):
    """The cluster answered, and did not do what it was told."""

    def __init__(self, address: str, complaint: str) -> None:
        super().__init__(address, complaint)
        self.address, self.complaint = address, complaint

    def __str__(self) -> str:
        return f"{self.address}: {self.complaint}"


class NotRunningError(ClusterError):
    """A command needs a running cluster."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"no cluster answers at {self.address}; start one with `breakeven serve`"
