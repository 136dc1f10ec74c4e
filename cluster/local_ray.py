"""The Ray cluster of one machine that we start ourselves, and everything of it that must go."""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster import joining, owner, state
from cluster.config import Config, check_nodes
from cluster.errors import StartError
from cluster.home import IN_CHECKOUT, ROOT

_STOP_S = 10.0
# Of a node's own resource, which says where and not how much.
_A_LITTLE = 0.001
# Ray sets it for a driver that `ray job submit` brought, with that job's runtime environment.
RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def prepare(config: Config) -> Path:
    """A run folder for one cluster, and the environment that Ray reads when it loads."""
    # Short: Ray's socket paths below it must stay under 107 bytes.
    run_dir = Path(tempfile.mkdtemp(prefix="breakeven-"))
    if config.ray.address is None:
        token = run_dir / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {
        # Else Ray rewrites 127.0.0.1 to another address of this machine.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Idle workers that nobody asked for would compete with engines that are starting.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray would run its workers at nice 15: whatever else the machine does would come first,
        # and on 2 cores a load generator alone cost a third of the tokens.
        "RAY_worker_niceness": "0",
    }
    return run_dir


def start(config: Config, model: Path | str, run_dir: Path) -> Mapping[str, float]:
    """Start Ray and Serve, on loopback, without Serve's HTTP proxy; or join the Ray cluster that is
    configured.

    Returns the resources that keep a process on this node, none where Ray has no other. Raises
    `ConfigError` for a `host` that the nodes cannot share, and `StartError` for a Ray cluster that
    cannot run what is configured.
    """
    import ray
    from ray import serve

    # Set first, or Serve's own lines stand between ours.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = config.ray
    if settings.address is not None:
        _join(settings.address)
    else:
        ray.init(
            num_cpus=_cpus(config),
            include_dashboard=settings.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=settings.dashboard_port,
            object_store_memory=settings.object_store_bytes,
            logging_level="error",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            _node_ip_address="127.0.0.1",
            _temp_dir=str(run_dir / "ray"),
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    check_nodes(config, nodes)
    # Ray gives each node a resource of this name.
    beside = {f"node:{ray.util.get_node_ip_address()}": _A_LITTLE} if nodes > 1 else {}
    if settings.address is not None:
        joining.check(config, model, beside)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    return beside


def _join(address: str) -> None:
    """Raises `StartError` where Ray does not answer, or is another version."""
    import ray

    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    try:
        ray.init(address=address, runtime_env=_code(), **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise StartError(f"Ray at {address} cannot be joined: {str(error).strip()}") from error


def _code() -> dict[str, Any] | None:
    """Where replicas on a Ray cluster that we join find this code: in this checkout's folder, if
    the job did not bring a folder of its own."""
    if RAY_JOB_CONFIG in os.environ or not IN_CHECKOUT:
        return None
    return {"env_vars": {"PYTHONPATH": str(ROOT)}}


def stop(app: str, joined: bool) -> None:
    """End the app's replicas gracefully, then Ray, if it is ours."""
    import ray
    from ray import serve

    # A Ray that is half gone must not keep us from ending the rest; one that never came up
    # must not be started for this. On a Ray cluster that was joined the app may be another's.
    if ray.is_initialized() and (not joined or owner.holds()):
        with contextlib.suppress(Exception):
            serve.delete(app)
    ray.shutdown()


def sweep(run_dir: Path, keep_logs: bool) -> int:
    """End what outlived the cluster and remove what it left; returns how many processes.

    Most shared memory needs no sweep of its own: Ray's object store lies in an unlinked file, and
    UCX's segments are removed when their last process ends. A host tier has a name while its
    engine starts (`kv.offload`), in which the run folder's is.
    """
    ended = end(state.leftovers(str(run_dir)))
    for segment in Path("/dev/shm").glob(f"vllm_offload_{run_dir.name}-*"):
        segment.unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(run_dir, ignore_errors=True)
    return ended


def end(processes: list[psutil.Process]) -> int:
    """Ask processes to end, and kill those that do not."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_S)
    return len(processes)


def logs(run_dir: Path) -> Iterator[Path]:
    """Files in which replicas wrote what they had to say."""
    session = run_dir / "ray" / "session_latest" / "logs"
    yield from sorted(session.glob("worker-*.err"), key=lambda path: path.stat().st_mtime)


def _cpus(config: Config) -> int:
    """Ray's cores are a count, no limit; a small machine still runs the default cluster."""
    pools = (config.prefill, config.decode, config.ingress, config.catalogue)
    wanted = sum(pool.replicas * pool.cpus for pool in pools)
    wanted += sum(pool.cpus for pool in (config.prefill, config.decode) if pool.surge)
    if config.tiers.vault is not None:
        wanted += config.tiers.vault.shards * config.tiers.vault.cpus
    return max(os.cpu_count() or 1, int(wanted + 0.999) + 1)
