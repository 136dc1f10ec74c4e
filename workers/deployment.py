"""A replica under Ray Serve: Serve places it, watches it and restarts it; tokens do not pass."""

import asyncio
import contextlib

import msgspec
from ray import serve

from workers import logs, node
from workers.announce import keep_announced, watch_shards
from workers.errors import WorkerError
from workers.replica import ReplicaProcess, ReplicaSettings


class EngineReplica:
    """The class of the prefill and of the decode deployment."""

    # Serve awaits it.
    async def __init__(self, cluster: str, settings: ReplicaSettings) -> None:  # type: ignore[misc]
        settings = msgspec.structs.replace(settings, host=node.listen_at(settings.host))
        context = serve.get_replica_context()
        name = f"{settings.role}-{context.rank.rank}"
        logs.configure(name)
        try:
            self._process = await asyncio.to_thread(ReplicaProcess, name, settings)
        except WorkerError as error:
            logs.fatal(str(error))
            raise RuntimeError(str(error)) from None
        self._tasks = [
            asyncio.create_task(self._process.serve()),
            asyncio.create_task(keep_announced(cluster, self._process.replica)),
        ]
        if settings.tiers.vault is not None:
            watching = watch_shards(cluster, self._process.seat_vault)
            self._tasks.append(asyncio.create_task(watching))

    async def check_health(self) -> None:
        """Serve's probe; raises once the engine or the channel has ended."""
        # Serve's controller unpickles what is raised here, and does not know our classes.
        try:
            self._process.check_health()
        except WorkerError as error:
            raise RuntimeError(str(error)) from None
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{self._process.name}: channel ended: {task.exception()!r}")

    async def __del__(self) -> None:
        """Serve's graceful stop: what runs here may finish."""
        if not hasattr(self, "_tasks"):  # the constructor failed
            return
        if not any(task.done() for task in self._tasks):
            await self._process.drain()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._process.stop)
