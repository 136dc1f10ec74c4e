"""What an ingress is told; apart from the ingress, so that cluster/ need not load vLLM."""

from typing import Annotated

import msgspec
from msgspec import Meta

from kv.codecs.codec import CodecName
from kv.live import RETRY_S
from router.policy import Policy


class AuditPlace(msgspec.Struct, frozen=True):
    """Where an ingress writes its audit: at most `files` files of `file_bytes` in `folder`."""

    folder: str
    file_bytes: int
    files: int


class BatchBounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What bounds batch requests at one ingress; configs/cpu.yaml explains each under `router`."""

    max_requests: Annotated[int, Meta(ge=1)] = 256
    max_age_s: Annotated[float, Meta(gt=0)] = 300.0
    seats: Annotated[float, Meta(gt=0, le=1)] = 0.5
    kv: Annotated[float, Meta(gt=0, le=1)] = 0.25


class IngressSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that an ingress is told; made by cluster/, plain data so that it can be pickled."""

    model: str
    served_names: tuple[str, ...]
    engine: dict[str, object]
    host: str
    replica_host: str
    port: int
    secret: bytes
    # How many replicas of each pool there are to be, and shards (`vault`).
    wanted: dict[str, int]
    max_requests: int = 256
    max_body_bytes: int = 10_000_000
    assumed_streams: float = 0.5
    compute_price: float = 0.1
    moving_price: float = 0.0
    session_slack: float = 0.1
    fetch_tokens: int = 512
    overrun: float = 2.0
    retry_s: float | None = RETRY_S
    hysteresis: float = 0.05
    displaced_price: float = 1.0
    explore: float = 0.0
    drain_s: float = 30.0
    request_timeout_s: float | None = None
    keys_file: str | None = None
    # Where curves of this model are kept from one cluster to the next.
    curves_file: str | None = None
    policy: Policy = Policy.BREAKEVEN
    shadow: Policy | None = None
    batch: BatchBounds = BatchBounds()
    # Lossy codecs that the model may use, each with its gate's id.
    gates: dict[CodecName, str] = {}
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    # None writes no audit.
    audit: AuditPlace | None = None

    def __repr__(self) -> str:
        # The secret stays out of logs and tracebacks.
        return f"IngressSettings({self.host}:{self.port}, ...)"
