"""An ingress under Ray Serve. It listens itself, so that no proxy hop stands before it."""

import asyncio
import contextlib
from typing import Any

from ray import serve

from router.serve_adapter import GcsDirectory
from router.settings import IngressSettings
from workers import logs, serve_port
from workers.channel import ChannelLink
from workers.errors import WorkerError


class IngressReplica:
    """The class of the ingress deployment; `pools` only ties the deployments into one app."""

    # Serve awaits it.
    async def __init__(self, cluster: str, settings: IngressSettings, *pools: Any) -> None:  # type: ignore[misc]
        # vLLM loads on the replica only: the process that deploys this class starts at once.
        from router.ingress import Ingress
        from workers import options

        serve_port.bind_to(settings.replica_host)
        name = f"ingress-{serve.get_replica_context().rank.rank}"
        logs.configure(name)
        try:
            args = options.namespace(settings.model, settings.served_names, settings.engine)
            # Reads the model's config and tokenizer, which takes seconds.
            config = await asyncio.to_thread(options.engine_config, args, None, False)
        except WorkerError as error:
            logs.fatal(str(error))
            raise RuntimeError(str(error)) from None
        directory = GcsDirectory(cluster, asyncio.get_running_loop().time)
        ingress = Ingress(name, settings, directory, ChannelLink, args, config)
        self._ingress = ingress
        self._task = asyncio.create_task(ingress.serve())

    async def check_health(self) -> None:
        """Serve's probe; raises once the server has ended."""
        if self._task.done():
            # Serve's controller unpickles what is raised here, and does not know our classes.
            raise RuntimeError(f"the ingress ended: {self._task.exception()!r}")
        try:
            await self._ingress.check_health()
        except Exception as error:  # the edge to Serve
            raise RuntimeError(f"the ingress answers nothing: {error}") from None

    async def __del__(self) -> None:
        """Serve's graceful stop: requests in flight may finish for `drain_s`."""
        if not hasattr(self, "_task"):  # the constructor failed
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
