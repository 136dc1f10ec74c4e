"""One replica put together: engine, mirror, probes and channel. Ray is not needed to run it."""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kv.curve import PrefillSample, fit_prefill
from kv.live import RETRY_S
from workers import connector, lanes
from workers.curve import ClientKeys, ServerKeys
from workers.errors import EngineDeadError, EngineOptionError, EngineStartError
from workers.messages import Replica, Role
from workers.metrics import Endpoint, EngineMetrics
from workers.peer.keys import PeerKeys
from workers.server import ReplicaServer
from workers.tiers import Tiers, model_identity, with_tiers

logger = logging.getLogger(__name__)

_LANES_EVERY_S = 1.0
# A step loop that stands for so long does not go on; ingresses have left it after 30 s.
_HOPELESS_S = 120.0


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that one replica is told; made by cluster/, plain data so that it can be pickled."""

    role: Role
    model: str
    served_names: tuple[str, ...]
    engine: dict[str, object]
    host: str
    channel_keys: ServerKeys
    scratch: str
    transports: str | None = None
    lease_s: int = 30
    drain_s: float = 30.0
    probe_s: float = 4.0
    seed: int = 0
    tiers: Tiers = Tiers()
    retry_s: float | None = RETRY_S
    vault_keys: ClientKeys | None = None
    peer_keys: PeerKeys | None = None
    metrics_port: int | None = None


class ReplicaProcess:
    """The replica of this process. At most one a process: vLLM and NIXL keep process state."""

    def __init__(self, name: str, settings: ReplicaSettings) -> None:
        """Start the engine and time it; takes tens of seconds. Raises `EngineStartError`."""
        self.name, self._settings = name, settings
        scratch = Path(settings.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        self._ucx_log = scratch / f"ucx-{name}-{os.getpid()}.log"
        self._side_channel = connector.prepare(settings.host, self._ucx_log, settings.transports)
        self._server = ReplicaServer(settings.host, settings.channel_keys)
        try:
            self.replica = self._start_engine()
        except Exception as error:  # the edge to vLLM: whatever it is, the engine did not start
            raise EngineStartError(name, f"{type(error).__name__}: {error}") from error

    def _start_engine(self) -> Replica:
        # Imports vLLM, which reads the environment that the constructor has just set.
        from vllm.platforms import current_platform

        from workers import options
        from workers.engine import Engine
        from workers.probe import probe

        began = time.monotonic()
        settings = self._settings
        connector.calm_progress_thread()
        _check_folder(settings.model, settings.host)
        parsed = options.namespace(settings.model, settings.served_names, settings.engine)
        transfer = connector.transfer_config(
            settings.role, current_platform.device_type, settings.lease_s
        )
        config = options.engine_config(parsed, self._with_tiers(transfer), events=True)
        self._engine = Engine(config, self._server.report, settings.retry_s)
        keys = settings.peer_keys
        peer_address = "" if keys is None else self._engine.open_peers(settings.host, keys)
        samples, step_s = probe(self._engine.core, settings.probe_s, settings.seed)
        self._open_vault([PrefillSample(*sample) for sample in samples])
        metrics = EngineMetrics(self._server.load)
        self._metrics = Endpoint(settings.host, settings.metrics_port, metrics)
        logger.info("%s: engine ready in %.1f s", self.name, time.monotonic() - began)
        hardware = options.hardware(config)
        return self._announced(config, samples, step_s, hardware, peer_address)

    def _announced(
        self,
        config: Any,
        samples: tuple[tuple[int, int, float], ...],
        step_s: float,
        hardware: str,
        peer_address: str,
    ) -> Replica:
        """Who this is; `config` is vLLM's."""
        settings = self._settings
        return Replica(
            name=self.name,
            role=settings.role,
            epoch=uuid.uuid4().hex,
            address=self._server.address,
            node=settings.host,
            pid=os.getpid(),
            model=settings.model,
            block_tokens=config.cache_config.block_size,
            kv_bytes_per_token=self._engine.kv_bytes_per_token(),
            kv_blocks=config.cache_config.num_gpu_blocks or 0,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            prefill_samples=samples,
            step_s=step_s,
            hardware=hardware,
            peer_address=peer_address,
            room_tokens=self._engine.room_tokens() if peer_address else 0,
            metrics_address=self._metrics.address,
            rdma=lanes.has_rdma(),
        )

    def _with_tiers(self, transfer: dict[str, Any]) -> dict[str, Any]:
        """vLLM's `kv_transfer_config`, with the tiers that are set."""
        settings = self._settings
        if not settings.tiers:
            return transfer
        transfer["engine_id"] = f"{Path(settings.scratch).parent.name}-{uuid.uuid4().hex}"
        identity = model_identity(settings.model, settings.engine)
        return with_tiers(transfer, settings.tiers, identity)

    def _open_vault(self, measured: Sequence[PrefillSample]) -> None:
        """Use the vault, if one is set; `measured` says what its blocks save."""
        from workers.quality import page_shape

        section, keys, tier = (
            self._settings.tiers.vault,
            self._settings.vault_keys,
            self._engine.vault,
        )
        if section is None or keys is None or tier is None:
            return
        shape = None if section.lossy is None else page_shape(self._engine.core)
        tier.attach(keys, fit_prefill(measured), shape, section.lossy)

    async def serve(self) -> None:
        """Answer the channel until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._server.serve(self._engine, self.replica))
            tasks.create_task(self._watch_lanes())
            self._engine.start()

    def seat_vault(self, addresses: Mapping[str, str]) -> None:
        """Where the vault's shards are, by name."""
        if self._engine.vault is not None:
            self._engine.vault.seat(addresses)

    async def _watch_lanes(self) -> None:
        known: tuple[str, ...] = ()
        while True:
            await asyncio.sleep(_LANES_EVERY_S)
            found = lanes.read(self._ucx_log)
            if found != known:
                known = found
                logger.info("%s: UCX lanes %s", self.name, ", ".join(found))
                self._server.show_lanes(found)

    def check_health(self) -> None:
        """Raise `EngineDeadError` once the step loop has ended, or stands still for good."""
        failure = self._engine.failure
        if failure is not None:
            raise EngineDeadError(self.name, f"{type(failure).__name__}: {failure}")
        stalled_s = self._engine.stalled_s()
        if stalled_s > _HOPELESS_S:
            raise EngineDeadError(self.name, f"no step for {stalled_s:.0f} s with work to do")

    async def drain(self) -> None:
        """Wait until no ingress has a request here any more, `drain_s` at most; a replica whose
        engine has ended has nothing to wait for."""
        if self._engine.failure is not None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                await self._server.drain()

    def stop(self) -> None:
        """Stop the engine and remove what it left on disk."""
        self._engine.stop()
        self._metrics.close()
        self._side_channel.close()
        self._ucx_log.unlink(missing_ok=True)


def _check_folder(model: str, host: str) -> None:
    """Raise `EngineOptionError` for a folder that is not there; vLLM would ask the hub for it."""
    if Path(model).is_absolute() and not Path(model).is_dir():
        complaint = f"no such folder on node {host}; every node needs the model at this path"
        raise EngineOptionError(f"model {model}", complaint)
