"""`breakeven serve`: start the cluster, say when it is ready, and end it without a trace."""

import queue
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import local_ray, state, tls, verdicts
from cluster.config import APP, LOOPBACK, Config, audit_dir, cache_dir
from cluster.errors import ConfigError, StartError
from cluster.model import ensure_default_model
from cluster.restart import take_order
from router import access
from router.errors import KeyFileError
from workers import logs

_READY_S = 600.0
_LOOK_S = 0.2
_PROGRESS_S = 5.0


def serve(config: Config) -> int:
    """Run a cluster until SIGINT or SIGTERM; returns the exit status."""
    url, cert_file = config.ingress.url, config.ingress.tls_cert_file
    certificate = tls.read_leaf(cert_file) if cert_file else None
    _check_keys(config)
    _warn_of_clear_text(config)
    _refuse_second(config)
    model = find_model(config)
    verdicts.gates(config, model)
    stop = _Signals()
    run_dir = local_ray.prepare(config)
    state.write(run_dir, url, certificate, str(audit_dir(config.audit.path)))
    failed = True
    try:
        deploy = _start(config, model, run_dir, tls.trust(certificate), stop)
        failed = False
        if not stop.asked:
            print(f"ready {url}", flush=True)
            while not stop.wait():
                deploy.restart(take_order(run_dir))
    finally:
        _end(run_dir, config.ray.address is not None, keep_logs=failed and not stop.asked)
    return 0


def _start(
    config: Config,
    model: Path | str,
    run_dir: Path,
    trust: ssl.SSLContext | None,
    stop: "_Signals",
) -> "_Deploy":
    began = time.monotonic()
    _say(began, "starting Ray")
    beside = local_ray.start(config, model, run_dir)
    stop.listen()  # Ray has put its own handlers in place of ours
    pools = f"{config.prefill.replicas} prefill, {config.decode.replicas} decode"
    _say(began, f"starting {pools}, {config.ingress.replicas} ingress on {config.device}")
    deploy = _Deploy(config, model, run_dir, beside)
    shown_at = time.monotonic()
    while not stop.asked and not _is_ready(config.ingress.url, trust):
        deploy.check(run_dir)
        if time.monotonic() - began > _READY_S:
            raise StartError(f"not ready after {_READY_S:.0f} s; logs are in {run_dir}")
        if time.monotonic() - shown_at > _PROGRESS_S:
            shown_at = time.monotonic()
            _say(began, deploy.progress())
        time.sleep(_LOOK_S)
    return deploy


class _Deploy:
    """Serve's deployment of the app, on a thread of its own, since it blocks until done."""

    def __init__(
        self, config: Config, model: Path | str, run_dir: Path, beside: Mapping[str, float]
    ) -> None:
        self._error: BaseException | None = None
        self._what = (config, model, run_dir / "scratch", secrets.token_bytes(32))
        self._beside = beside
        self._orders: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def restart(self, pools: Sequence[str]) -> None:
        """Have the replicas of these pools replaced, once what is under way is done."""
        print(f"restarting {' and '.join(pools)}", flush=True)
        self._orders.put(pools)

    def _run(self) -> None:
        from ray import serve

        from cluster import app

        restarts: Counter[str] = Counter()
        while True:
            try:
                versions = {pool: str(count) for pool, count in restarts.items()}
                built = app.build(*self._what, versions, self._beside)
                serve.run(built, name=APP, route_prefix=None)
            except BaseException as error:  # `check` raises it during a start; later ones may work
                self._error = error
                print(f"deployment failed: {error}", file=sys.stderr, flush=True)
            restarts.update(self._orders.get())

    def check(self, run_dir: Path) -> None:
        """Raise `StartError` once the deployment has failed."""
        if self._error is not None:
            why = _why(run_dir, str(self._error))
            raise StartError(f"the cluster did not start: {why}\nlogs are in {run_dir}/ray")

    def progress(self) -> str:
        """What is running and what is awaited, as Serve counts it."""
        from ray import serve

        status = serve.status().applications.get(APP)
        if status is None:
            return "deploying"
        parts = []
        for name, deployment in sorted(status.deployments.items()):
            states = deployment.replica_states
            running = states.get("RUNNING", 0)
            parts.append(f"{name} {running}/{sum(states.values())} up")
        return ", ".join(parts) or "deploying"


class _Signals:
    """SIGINT and SIGTERM: the first asks to stop, a second one ends waiting for a drain. SIGHUP
    asks for a rolling restart."""

    def __init__(self) -> None:
        self._came, self._stop = threading.Event(), False
        self.listen()

    def listen(self) -> None:
        """Take the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_restart)

    @property
    def asked(self) -> bool:
        """Whether it is to stop."""
        return self._stop

    def wait(self) -> bool:
        """True when it is to stop, False when a restart was asked for."""
        self._came.wait()
        self._came.clear()
        return self._stop

    def _on_stop(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        print("stopping: requests in flight may finish", flush=True)
        self._stop = True
        self._came.set()

    def _on_restart(self, number: int, frame: object) -> None:
        self._came.set()


def _end(run_dir: Path, joined: bool, keep_logs: bool) -> None:
    try:
        local_ray.stop(APP, joined)
    except KeyboardInterrupt:
        print("stopping now", flush=True)
    local_ray.sweep(run_dir, keep_logs)
    state.clear()
    print("stopped", flush=True)


def _refuse_second(config: Config) -> None:
    running = state.read()
    if running is not None and running.supervisor() is not None:
        raise StartError(
            f"a cluster already runs at {running.url} (pid {running.pid}); "
            "end it with `breakeven down`, or set BREAKEVEN_CACHE to run a second one"
        )
    if running is not None:
        ended = local_ray.sweep(Path(running.run_dir), keep_logs=False)
        print(f"a crashed cluster was cleared away, {ended} processes ended", file=sys.stderr)
        state.clear()
    if _listens(config.ingress.host, config.ingress.port):
        raise StartError(f"something else answers at {config.ingress.url}; choose another --port")


def _check_keys(config: Config) -> None:
    if config.ingress.keys_file is not None:
        try:
            access.read(Path(config.ingress.keys_file))
        except KeyFileError as error:
            raise ConfigError("ingress.keys_file", str(error)) from error


def find_model(config: Config) -> Path | str:
    """The folder of the configured model, made first if it is the default one, or its name on the
    hub. Raises `ConfigError` for a folder that is not there."""
    if config.model == "default":
        return ensure_default_model(cache_dir())
    folder = Path(config.model)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or config.model.startswith("."):
        raise ConfigError("model", f"no folder {config.model}")
    return config.model


def _warn_of_clear_text(config: Config) -> None:
    ingress = config.ingress
    if ingress.keys_file and ingress.host not in LOOPBACK and ingress.tls_cert_file is None:
        print(
            f"warning: API keys travel in clear to {ingress.url}; set ingress.tls_cert_file and "
            "ingress.tls_key_file, or put TLS in front",
            file=sys.stderr,
            flush=True,
        )


def _is_ready(url: str, trust: ssl.SSLContext | None) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2, context=trust) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _why(run_dir: Path, otherwise: str) -> str:
    """The reason that a replica gave for not starting; Serve's own words where none did."""
    for path in local_ray.logs(run_dir):
        reason = logs.read_fatal(path.read_text(errors="replace"))
        if reason is not None:
            return reason
    return otherwise


def _say(began: float, what: str) -> None:
    print(f"[{time.monotonic() - began:5.1f} s] {what}", file=sys.stderr, flush=True)
