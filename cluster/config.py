"""The cluster's configuration: small typed sections, unknown keys refused.

`configs/cpu.yaml` is the embedded default and the reference: every key stands there with its
comment. A file given with --config replaces sections key by key; command-line options come last.
The environment is read here and nowhere else.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from cluster import tls
from cluster.errors import ConfigError
from cluster.home import HOME, default_cache
from router.policy import Policy
from router.settings import BatchBounds
from workers.node import OF_NODE
from workers.tiers import Resources, Tiers

# Names the Serve application, and the cluster in the directory of replicas.
APP = "breakeven"
DEFAULT = HOME / "configs" / "cpu.yaml"

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_WILDCARDS = frozenset({"", "0.0.0.0", "::", "*"})
# Ray waits 60 s for an application to end, and so does `down`.
MAX_DRAIN_S = 45.0

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One pool of engines; `engine` overrides the common engine options for it."""

    replicas: Count = 1
    cpus: Annotated[float, Meta(gt=0)] = 1.0
    resources: Resources = {}
    surge: bool = True
    engine: dict[str, Any] = {}


class IngressSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP side."""

    replicas: Positive = 1
    cpus: Annotated[float, Meta(gt=0)] = 1.0
    resources: Resources = {}
    host: str = "127.0.0.1"
    port: Port = 8000
    max_requests: Positive = 256
    max_body_bytes: Positive = 10_000_000
    request_timeout_s: Seconds | None = 600.0
    keys_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    drain_s: Annotated[float, Meta(gt=0, le=MAX_DRAIN_S)] = 30.0

    @property
    def url(self) -> str:
        """Where it answers."""
        scheme = "https" if self.tls_cert_file else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"


class CatalogueSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes that know which replica holds which block."""

    replicas: Positive = 1
    cpus: Annotated[float, Meta(gt=0)] = 0.5
    resources: Resources = {}


class KvSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How KV moves between replicas."""

    transports: str | None = None
    lease_s: Positive = 30


class RouterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What plans are made by."""

    policy: Policy = Policy.BREAKEVEN
    shadow: Policy | None = None
    assumed_streams: Annotated[float, Meta(ge=0)] = 0.5
    compute_price: Annotated[float, Meta(ge=0)] = 0.1
    moving_price: Annotated[float, Meta(ge=0)] = 0.0
    session_slack: Annotated[float, Meta(ge=0)] = 0.1
    fetch_tokens: Positive = 512
    overrun: Annotated[float, Meta(ge=1)] = 2.0
    retry_s: Seconds | None = 5.0
    hysteresis: Annotated[float, Meta(ge=0)] = 0.05
    displaced_price: Annotated[float, Meta(ge=0)] = 1.0
    explore: Annotated[float, Meta(ge=0, le=1)] = 0.01
    probe_s: Seconds = 4.0
    batch: BatchBounds = BatchBounds()


class AuditSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is written down of each request."""

    files: Annotated[int, Meta(ge=0, le=1000)] = 4
    file_bytes: Annotated[int, Meta(ge=65_536)] = 16_777_216
    path: str | None = None


class MetricsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where processes answer Prometheus: engines and shards at `port`, a catalogue at the next."""

    port: Annotated[int, Meta(ge=1, le=65534)] | None = None


class RaySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The Ray cluster: one of our own on this machine, or one that runs."""

    address: str | None = None
    dashboard: bool = False
    dashboard_port: Port = 8265
    object_store_bytes: Annotated[int, Meta(ge=78_643_200)] = 100_000_000


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that can be set."""

    model: str = "default"
    served_names: Annotated[tuple[str, ...], Meta(min_length=1)] = ("smollm2",)
    device: Literal["cpu", "cuda"] = "cpu"
    host: str = "127.0.0.1"
    engine: dict[str, Any] = {}
    prefill: Pool = Pool()
    decode: Pool = Pool()
    ingress: IngressSection = IngressSection()
    catalogue: CatalogueSection = CatalogueSection()
    kv: KvSection = KvSection()
    tiers: Tiers = Tiers()
    router: RouterSection = RouterSection()
    audit: AuditSection = AuditSection()
    metrics: MetricsSection = MetricsSection()
    ray: RaySection = RaySection()

    def tensor_parallel(self, pool: Pool) -> int:
        """GPUs of one replica of `pool`."""
        sizes = {**self.engine, **pool.engine}
        ranks = (sizes.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        total = 1
        for size in ranks:
            total *= int(size)
        return total


def engine_options(config: Config, pool: Pool | None) -> dict[str, Any]:
    """vLLM's options for a pool, or for the API server; a null option is left to vLLM."""
    merged = {**config.engine, **(pool.engine if pool else {})}
    return {name: value for name, value in merged.items() if value is not None}


def load(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """The default file, then `path`, then `overrides` (nested mappings). Raises `ConfigError`."""
    merged = _read(DEFAULT)
    if path is not None:
        merged = _merge(merged, _read(path))
    merged = _merge(merged, overrides)
    try:
        config = msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(str(path or DEFAULT), str(error)) from error
    config = _joining(config)
    _check(config, str(path or DEFAULT))
    return config


def schema() -> dict[str, Any]:
    """JSON Schema of the sections, with the types that they refer to under `$defs`."""
    root, defined = msgspec.json.schema_components([Config], ref_template="#/$defs/{name}")
    return {**root[0], "$defs": defined}


def check_nodes(config: Config, nodes: int) -> None:
    """Raise `ConfigError` for a `host` that replicas on several Ray nodes cannot share."""
    if nodes > 1 and config.host != OF_NODE:
        complaint = f"{config.host} is an address of one machine, and Ray has {nodes} nodes"
        raise ConfigError("host", f"{complaint}: set host: {OF_NODE}")


def _joining(config: Config) -> Config:
    """With the Ray cluster that the environment names, as Ray itself would take it."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local") or config.ray.address is not None:
        return config
    return msgspec.structs.replace(config, ray=msgspec.structs.replace(config.ray, address=address))


def admin_key() -> str | None:
    """What `status`, `doctor` and `forget` show to a cluster that has keys."""
    return os.environ.get("BREAKEVEN_ADMIN_KEY") or None


def api_key() -> str | None:
    """What `batch` shows to a cluster that has keys."""
    return os.environ.get("BREAKEVEN_API_KEY") or None


def cluster_key() -> bytes:
    """The 32 bytes that all processes of a cluster know where no `serve` gives them a secret of its
    own. Raises `ConfigError`."""
    text = os.environ.get("BREAKEVEN_CLUSTER_KEY", "").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        complaint = (
            f"{len(text)} characters, 64 hex digits wanted: `openssl rand -hex 32` makes some"
        )
        raise ConfigError("BREAKEVEN_CLUSTER_KEY", complaint)
    return key


def cache_dir() -> Path:
    """Where models and the state of running clusters are kept."""
    return Path(os.environ.get("BREAKEVEN_CACHE") or default_cache()).resolve()


def audit_dir(path: str | None = None) -> Path:
    """Where ingresses write their audit: `audit.path`, or a folder of the cache where that is not
    set."""
    return cache_dir() / "audit" if path is None else Path(path).expanduser().absolute()


def _check(config: Config, source: str) -> None:
    if config.decode.replicas < 1:
        raise ConfigError(source, "decode.replicas is 0, at least 1 wanted: tokens come from there")
    if config.host in _WILDCARDS:
        raise ConfigError(source, f"host {config.host} is no address that others could reach")
    if config.ingress.host not in LOOPBACK and config.ingress.keys_file is None:
        complaint = f"ingress.host {config.ingress.host} is not loopback: set ingress.keys_file"
        raise ConfigError(source, complaint)
    _check_tls(config.ingress, source)
    if config.tiers.peer is not None and config.tiers.host is None:
        raise ConfigError(
            source, "tiers.peer without tiers.host: peers read each other's host tier"
        )
    if config.ray.address is None and config.catalogue.replicas > 1:
        complaint = f"catalogue.replicas is {config.catalogue.replicas}, and our own Ray has 1 node"
        raise ConfigError(source, complaint)


def _check_tls(ingress: IngressSection, source: str) -> None:
    if (ingress.tls_cert_file is None) != (ingress.tls_key_file is None):
        missing = "tls_cert_file" if ingress.tls_cert_file is None else "tls_key_file"
        raise ConfigError(source, f"ingress.{missing} is missing: TLS wants both or neither")
    if ingress.tls_cert_file is not None and ingress.tls_key_file is not None:
        tls.check(ingress.tls_cert_file, ingress.tls_key_file)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(str(path), f"holds a {type(content).__name__}, a mapping wanted")
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
