"""The ingress, the catalogue and the vault under Ray Serve, which places, watches and restarts
them."""

import asyncio
import contextlib
import logging
import os
import uuid
from functools import partial
from typing import Any

import msgspec
from ray import serve

from kv.errors import VaultError
from kv.vault.wire import by_codec
from router.catalogue.client import CatalogueLine
from router.catalogue.metrics import CatalogueMetrics
from router.catalogue.node import CatalogueNode
from router.catalogue.server import CatalogueServer
from router.catalogue.wire import Seat, SeatRecord, seat_prefix
from router.pauses import freeze_start
from router.serve_adapter import GcsDirectory, GcsOrders
from router.settings import IngressSettings
from router.targets import Target, TargetRecord, target_prefix
from router.vault import VaultView
from workers import announce, logs, node
from workers.channel import ChannelLink
from workers.curve import client_keys, server_keys
from workers.directory import Shard, ShardRecord, shard_prefix
from workers.errors import WorkerError
from workers.messages import Inbox, Link, Replica
from workers.metrics import Endpoint, ShardMetrics
from workers.tiers import shard_names
from workers.vault.process import ShardProcess, ShardSettings

logger = logging.getLogger(__name__)


class IngressReplica:
    """The class of the ingress deployment. It listens itself, so that no proxy hop stands before
    it; `others` only ties the deployments into one app."""

    # Serve awaits it.
    async def __init__(self, cluster: str, settings: IngressSettings, *others: Any) -> None:  # type: ignore[misc]
        # vLLM loads on the replica only: the process that deploys this class starts at once.
        from router.endpoint import IngressEndpoint
        from router.ingress import Ingress
        from workers import options

        here = node.listen_at(settings.replica_host)
        name = f"ingress-{serve.get_replica_context().rank.rank}"
        logs.configure(name)
        try:
            args = options.namespace(settings.model, settings.served_names, settings.engine)
            # Reads the model's config and tokenizer, which takes seconds.
            config = await asyncio.to_thread(options.engine_config, args, None, False)
        except WorkerError as error:
            logs.fatal(str(error))
            raise RuntimeError(str(error)) from None
        now = asyncio.get_running_loop().time
        directory = GcsDirectory(cluster, now)
        orders = GcsOrders(cluster, settings.secret)
        keys = client_keys(settings.secret)
        link = partial(ChannelLink, keys=keys)
        line = CatalogueLine(directory, name, here, keys, now)
        vault = VaultView(directory)
        ingress = Ingress(
            name, settings, directory, vault, orders, link, line, directory, args, config
        )
        self._ingress = ingress
        self._task = asyncio.create_task(ingress.serve())
        self._task.add_done_callback(_ended)
        endpoint = IngressEndpoint(here, ingress.registry)
        self._told = [
            asyncio.create_task(endpoint.serve()),
            asyncio.create_task(_tell(cluster, Target([endpoint.address], {"ingress": name}))),
        ]
        for task in self._told:  # who serves goes on without it
            task.add_done_callback(_untold)

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
        if not hasattr(self, "_told"):  # the constructor failed
            return
        self._task.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        finally:  # until its last request has ended it can be scraped
            for task in self._told:
                task.cancel()
            await asyncio.gather(*self._told, return_exceptions=True)


async def _tell(cluster: str, target: Target) -> None:
    """Until cancelled: say in the directory that this process answers Prometheus there."""
    epoch = uuid.uuid4().hex
    key = target_prefix(cluster) + epoch
    await announce.keep(key, lambda beat: TargetRecord(target, epoch, beat))


def _ended(task: "asyncio.Task[None]") -> None:
    """Say why an ingress ended, with where: Serve only ever says that it did."""
    if not task.cancelled():
        logger.error("the ingress ended", exc_info=task.exception())


def _untold(task: "asyncio.Task[None]") -> None:
    """Say that nobody can scrape an ingress any more, or find out where."""
    if not task.cancelled():
        logger.error("metrics of this ingress are not served", exc_info=task.exception())


class CatalogueReplica:
    """The class of the catalogue deployment."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, cluster: str, host: str, secret: bytes, metrics_port: int | None
    ) -> None:
        host = node.listen_at(host)
        name = f"catalogue-{serve.get_replica_context().rank.rank}"
        logs.configure(name)

        def connect(replica: Replica, inbox: Inbox) -> Link:
            return ChannelLink(replica.address, name, inbox, client_keys(secret), follow=True)

        now = asyncio.get_running_loop().time
        known = CatalogueNode(GcsDirectory(cluster, now), connect, now)
        freeze_start()
        server = CatalogueServer(host, server_keys(secret), known.holdings, known.beat, now)
        metrics = CatalogueMetrics(server.last, lambda: len(server.ingresses()))
        try:
            self._metrics = Endpoint(host, metrics_port, metrics)
        except WorkerError as error:
            logs.fatal(str(error))
            raise RuntimeError(str(error)) from None
        seat = Seat(name, uuid.uuid4().hex, server.address, host)
        key = seat_prefix(cluster) + seat.epoch
        self._tasks = [
            asyncio.create_task(known.watch()),
            asyncio.create_task(server.serve()),
            asyncio.create_task(announce.keep(key, lambda beat: SeatRecord(seat, beat))),
            asyncio.create_task(
                _tell(cluster, Target([self._metrics.address], {"catalogue": name}))
            ),
        ]

    async def check_health(self) -> None:
        """Serve's probe; raises once it answers nobody any more."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the catalogue ended: {task.exception()!r}")

    async def __del__(self) -> None:
        """Serve's graceful stop; ingresses turn to another catalogue, or plan without hits."""
        if not hasattr(self, "_tasks"):  # the constructor failed
            return
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)


class VaultReplica:
    """The class of the vault deployment: one shard."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, cluster: str, settings: ShardSettings, metrics_port: int | None
    ) -> None:
        settings = msgspec.structs.replace(settings, host=node.listen_at(settings.host))
        # A shard that takes a dead one's place takes its name, and with it its blocks on disk.
        rank = serve.get_replica_context().rank.rank
        name = shard_names(rank + 1)[rank]
        logs.configure(name)
        try:
            self._process = process = ShardProcess(name, settings)
            metrics = ShardMetrics(process.stats, process.quota_bytes)
            self._metrics = Endpoint(settings.host, metrics_port, metrics)
        except (VaultError, WorkerError) as error:
            logs.fatal(str(error))
            raise RuntimeError(str(error)) from None
        shard = Shard(
            name,
            uuid.uuid4().hex,
            process.address,
            settings.host,
            os.getpid(),
            process.quota_bytes,
            self._metrics.address,
        )

        def record(beat: int) -> ShardRecord:
            held = process.stats()
            return ShardRecord(shard, beat, held.blocks, by_codec(held))

        key = shard_prefix(cluster) + name
        self._tasks = [
            asyncio.create_task(process.serve()),
            asyncio.create_task(announce.keep(key, record)),
        ]

    async def check_health(self) -> None:
        """Serve's probe; raises once it answers nobody any more."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the shard ended: {task.exception()!r}")

    async def __del__(self) -> None:
        """Serve's graceful stop; what was acknowledged is on disk, where there is one."""
        if not hasattr(self, "_tasks"):  # the constructor failed
            return
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
