"""From a configuration to Ray Serve deployments: what runs where, with which environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from ray import serve
from ray.serve import Application

from cluster import verdicts
from cluster.config import APP, Config, Pool, audit_dir, cache_dir, engine_options
from cluster.fit import of_pool
from kv.fingerprint import fingerprint, folder_identity
from router.settings import AuditPlace, IngressSettings
from workers.connector import with_gpu
from workers.curve import server_keys
from workers.messages import Role
from workers.node import OF_NODE
from workers.peer.keys import peer_keys
from workers.replica import ReplicaSettings
from workers.tiers import Tiers, VaultDisk
from workers.vault.disk import DiskExtent
from workers.vault.keys import client_keys, shard_keys
from workers.vault.pages import FORMAT
from workers.vault.process import ShardSettings

# Beyond the ingress's drain: an engine outlives the requests that it still serves.
_ENGINE_STOP_S = 15.0
# Of every deployment. Serve asks this often whether a replica is well, and this long waits for the
# answer: a CPU engine that computes a long chunk may be slow to give it. A replica that could not
# start twice will not start.
_ALIKE: dict[str, Any] = {
    "health_check_period_s": 5.0,
    "health_check_timeout_s": 30.0,
    "graceful_shutdown_wait_loop_s": 0.2,
    "max_constructor_retry_count": 2,
}
# Of a vault's files on disk.
_SEGMENT_BYTES = 64 << 20


def build(
    config: Config,
    model: Path | str,
    scratch: Path,
    secret: bytes,
    versions: Mapping[str, str],
    beside: Mapping[str, float],
) -> Application:
    """The Serve application: ingress, catalogue, prefill pool, decode pool, and the vault.

    Deployed again, Serve replaces the replicas of those deployments whose entry in `versions`, by
    name, is another. `beside` are the resources of the node that ingresses and catalogue keep to,
    unless theirs are configured.
    """
    pools = [
        _engines(config, Role.PREFILL, config.prefill, model, scratch, secret),
        _engines(config, Role.DECODE, config.decode, model, scratch, secret),
    ]
    behind = [_catalogue(config, secret, beside), *pools, _vault(config, secret)]
    bound = [each.bound(versions) for each in behind if each is not None]
    return _ingress(config, model, secret, beside).bound(versions, *bound)


class _Unbound(NamedTuple):
    """A deployment, and what its replicas' constructors are told."""

    deployment: serve.Deployment
    told: tuple[Any, ...]

    def bound(self, versions: Mapping[str, str], *others: Application) -> Application:
        """Serve replaces every replica of whatever is deployed again under another version, and
        gives each deployment a random one unless told."""
        version = versions.get(self.deployment.name, "0")
        return self.deployment.options(version=version, _internal=True).bind(*self.told, *others)


def _engines(
    config: Config,
    role: Role,
    pool: Pool,
    model: Path | str,
    scratch: Path,
    secret: bytes,
) -> _Unbound | None:
    if pool.replicas == 0:
        return None
    # Ray imports it on the replicas; here vLLM stays unloaded.
    from workers.deployment import EngineReplica

    deployment = serve.deployment(
        EngineReplica,
        name=role,
        num_replicas=pool.replicas,
        ray_actor_options=_resources(config, pool, model),
        graceful_shutdown_timeout_s=config.ingress.drain_s + _ENGINE_STOP_S,
        max_surge_percent=_one_of(pool.replicas) if pool.surge else 0,
        **_ALIKE,
        **_bundles(config, pool),
    )
    settings = _replica_settings(config, role, pool, model, scratch, secret)
    return _Unbound(deployment, (APP, settings))


def _replica_settings(
    config: Config,
    role: Role,
    pool: Pool,
    model: Path | str,
    scratch: Path,
    secret: bytes,
) -> ReplicaSettings:
    return ReplicaSettings(
        role=role,
        model=str(model),
        served_names=config.served_names,
        engine=engine_options(config, pool),
        host=config.host,
        # Not the secret itself: a replica need not know tenants by name.
        channel_keys=server_keys(secret),
        scratch=str(scratch),
        transports=with_gpu(config.kv.transports, config.device),
        lease_s=config.kv.lease_s,
        drain_s=config.ingress.drain_s,
        probe_s=config.router.probe_s,
        tiers=_placed(config.tiers),
        retry_s=config.router.retry_s,
        vault_keys=None if config.tiers.vault is None else client_keys(secret),
        peer_keys=None if config.tiers.peer is None else peer_keys(secret),
        metrics_port=config.metrics.port,
    )


def _one_of(replicas: int) -> int:
    """Percent of a pool that Serve rounds up to one replica."""
    return max(1, 100 // replicas)


def _ingress(
    config: Config,
    model: Path | str,
    secret: bytes,
    beside: Mapping[str, float],
) -> _Unbound:
    from cluster.deployment import IngressReplica

    section = config.ingress
    deployment = serve.deployment(
        IngressReplica,
        name="ingress",
        num_replicas=section.replicas,
        ray_actor_options={
            "num_cpus": section.cpus,
            "resources": dict(section.resources or beside),
            "runtime_env": {"env_vars": environment(config, model, 1)},
        },
        graceful_shutdown_timeout_s=section.drain_s + 5,
        **_ALIKE,
    )
    return _Unbound(deployment, (APP, _ingress_settings(config, model, secret)))


def _ingress_settings(config: Config, model: Path | str, secret: bytes) -> IngressSettings:
    section, router = config.ingress, config.router
    return IngressSettings(
        model=str(model),
        served_names=config.served_names,
        engine=engine_options(config, None),
        host=section.host,
        replica_host=config.host,
        port=section.port,
        secret=secret,
        wanted=_wanted(config),
        max_requests=section.max_requests,
        max_body_bytes=section.max_body_bytes,
        assumed_streams=router.assumed_streams,
        compute_price=router.compute_price,
        moving_price=router.moving_price,
        policy=router.policy,
        shadow=router.shadow,
        batch=router.batch,
        session_slack=router.session_slack,
        fetch_tokens=router.fetch_tokens,
        overrun=router.overrun,
        retry_s=router.retry_s,
        hysteresis=router.hysteresis,
        displaced_price=router.displaced_price,
        explore=router.explore,
        drain_s=section.drain_s,
        request_timeout_s=section.request_timeout_s,
        keys_file=_resolved(section.keys_file),
        curves_file=str(kept_curves(model)),
        gates=verdicts.gates(config, model),
        tls_cert_file=_resolved(section.tls_cert_file),
        tls_key_file=_resolved(section.tls_key_file),
        audit=_audit(config),
    )


def _wanted(config: Config) -> dict[str, int]:
    vault = config.tiers.vault
    return {
        Role.PREFILL: config.prefill.replicas,
        Role.DECODE: config.decode.replicas,
        "vault": 0 if vault is None else vault.shards,
    }


def kept_curves(model: Path | str) -> Path:
    """Where the curves of a model are kept from one cluster to the next."""
    folder = Path(model)
    known = folder_identity(folder) if folder.is_dir() else fingerprint({"model": str(model)})
    return cache_dir() / "curves" / f"{known}.json"


def _audit(config: Config) -> AuditPlace | None:
    section = config.audit
    if section.files == 0:
        return None
    return AuditPlace(str(audit_dir(section.path)), section.file_bytes, section.files)


def _catalogue(config: Config, secret: bytes, beside: Mapping[str, float]) -> _Unbound:
    from cluster.deployment import CatalogueReplica

    section = config.catalogue
    # Several are for as many nodes.
    near = {} if section.replicas > 1 else beside
    deployment = serve.deployment(
        CatalogueReplica,
        name="catalogue",
        num_replicas=section.replicas,
        ray_actor_options={
            "num_cpus": section.cpus,
            "resources": dict(section.resources or near),
        },
        # A second one on a node would only follow the same blocks; it is for the next node.
        max_replicas_per_node=1 if section.replicas > 1 else None,
        graceful_shutdown_timeout_s=5,
        **_ALIKE,
    )
    # It may be on a node that has an engine, too.
    metrics_port = None if config.metrics.port is None else config.metrics.port + 1
    return _Unbound(deployment, (APP, config.host, secret, metrics_port))


def _vault(config: Config, secret: bytes) -> _Unbound | None:
    section = config.tiers.vault
    if section is None:
        return None
    from cluster.deployment import VaultReplica

    settings = ShardSettings(
        host=config.host,
        keys=shard_keys(secret),
        fingerprint=FORMAT,
        memory_bytes=section.memory_bytes,
        other_tenant_bytes=section.tenant_bytes,
        disk=None if section.disk is None else _extent(section.disk),
    )
    deployment = serve.deployment(
        VaultReplica,
        name="vault",
        num_replicas=section.shards,
        ray_actor_options={"num_cpus": section.cpus, "resources": section.resources},
        graceful_shutdown_timeout_s=5,
        **_ALIKE,
    )
    return _Unbound(deployment, (APP, settings, config.metrics.port))


def _extent(disk: VaultDisk) -> DiskExtent:
    # Two segments of the budget are no room for blocks: a small extent has small ones.
    segment_bytes = min(_SEGMENT_BYTES, disk.bytes // 16)
    return DiskExtent(path=_absolute(disk.path), bytes=disk.bytes, segment_bytes=segment_bytes)


def _placed(tiers: Tiers) -> Tiers:
    """With paths that do not depend on where a replica runs. Symlinks stay: a replica refuses
    them."""
    disk = tiers.disk
    if disk is None:
        return tiers
    path, key = (None if each is None else _absolute(each) for each in (disk.path, disk.key_file))
    disk = msgspec.structs.replace(disk, path=path, key_file=key)
    return msgspec.structs.replace(tiers, disk=disk)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _resolved(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _resources(config: Config, pool: Pool, model: Path | str) -> dict[str, Any]:
    env = {"env_vars": environment(config, model, max(1, round(pool.cpus)))}
    asked = {"num_cpus": pool.cpus, "resources": pool.resources, "runtime_env": env}
    if config.device == "cuda" and config.tensor_parallel(pool) == 1:
        asked["num_gpus"] = 1
    return asked


def _bundles(config: Config, pool: Pool) -> dict[str, Any]:
    """A placement group for replicas of several GPUs: all on one node, the replica's actor in
    the first bundle, vLLM's ranks as its child processes."""
    gpus = config.tensor_parallel(pool)
    if config.device != "cuda" or gpus == 1:
        return {}
    bundles = [of_pool(config, pool)]
    return {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}


def environment(config: Config, model: Path | str, threads: int) -> dict[str, str]:
    """What vLLM and its libraries read when they load."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CONFIGURE_LOGGING": "0",
        # The mirror needs whole hashes; vLLM's default cuts them to 64 bits.
        "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",
    }
    if config.host != OF_NODE:  # else each process says it (`workers.node`)
        env["VLLM_HOST_IP"] = config.host
    if isinstance(model, Path):
        env["HF_HUB_OFFLINE"] = "1"
    if config.device == "cpu":
        env |= {
            # One process an engine; vLLM would turn `uni` into `mp` on CPUs.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Several engines share the cores; vLLM would pin them all to the same ones.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return env
