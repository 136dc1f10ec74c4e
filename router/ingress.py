"""One ingress put together: vLLM's API app over the cluster, on a socket of its own."""

import asyncio
import logging
import random
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app

from router import curve_book
from router.access import KeyRing
from router.admin import PATHS, Admin
from router.admission import Admission
from router.asgi import App, Receive, Scope, Send
from router.audit import Audit
from router.audit_log import AuditLog
from router.catalogue.client import CatalogueLine
from router.catalogue.ledger import SharedLedger
from router.client import ClusterClient, warm_body
from router.curve_metrics import CurveMetrics
from router.decisions import Decisions
from router.endpoint import QuietServer
from router.entry import Scribe
from router.explorer import Explorer
from router.fleet import Fleet
from router.guard import Guard
from router.member import Member
from router.metrics import FleetMetrics, PolicyMetrics, RequestMetrics
from router.orders import InForce, Order, Orders
from router.pauses import freeze_start
from router.pipeline import Pipeline
from router.planner import Planner, Prices
from router.policy_admin import PolicyAdmin
from router.pool_metrics import PoolMetrics
from router.probing import Probing
from router.pseudonyms import Pseudonyms
from router.replica_metrics import ReplicaMetrics
from router.roster import Directory
from router.salt import Salter
from router.settings import IngressSettings
from router.shadow import Shadow
from router.targets import TargetDirectory
from router.tiers_told import tell_tiers
from router.vault import VaultView
from router.waiting import Room, RoomMetrics
from workers.messages import Inbox, Link, Replica, Role

logger = logging.getLogger(__name__)

# An ingress that knows nobody yet listens after this all the same, to say so.
_LISTENS_WITHIN_S = 5.0
# The audit's last records are on disk by then, or are lost.
_LOG_ENDS_S = 2.0

# (address of a replica, name of this ingress, where its replies go) to a link.
Connect = Callable[[str, str, Inbox], Link]


class Ingress:
    """Serves HTTP until cancelled. Made on the running event loop.

    `args` and `config` are vLLM's, made from the same options as the engines'.
    """

    def __init__(
        self,
        name: str,
        settings: IngressSettings,
        directory: Directory,
        vault: VaultView,
        orders: Orders,
        connect: Connect,
        line: CatalogueLine,
        targets: TargetDirectory,
        args: Namespace,
        config: VllmConfig,
    ) -> None:
        self._settings, self._args, self._line, self._vault = settings, args, line, vault
        # The loop's own clock, but finer: uvloop tells whole milliseconds, and to its thread alone.
        now = time.monotonic
        self._keys = KeyRing(Path(settings.keys_file), now) if settings.keys_file else None
        self._curves = Path(settings.curves_file) if settings.curves_file else None
        self.fleet = self._followed(name, directory, connect, now)
        self.registry = registry = CollectorRegistry()
        self._register()
        self._in_force, shadow = InForce(Order(settings.policy, settings.shadow), orders), Shadow()
        registry.register(PolicyMetrics(self._in_force.order, shadow))
        scribe = Scribe(Pseudonyms(settings.secret), settings.served_names[0], now, time.time)
        self._log = AuditLog(settings.audit, name, scribe, now) if settings.audit else None
        if self._log is not None:
            registry.register(self._log)
        audit = Audit(now, RequestMetrics(registry), log=self._log)
        room_metrics = RoomMetrics(registry)
        room = room_metrics.room = Room(self.fleet, settings.batch, now, room_metrics)
        admission = Admission(settings.max_requests)
        self._admissions = room.admissions(admission)
        explorer = Explorer(settings.explore, now, random.Random())
        planner = Planner(self.fleet, _prices(settings), self._in_force.order, explorer)
        pipeline = Pipeline(self.fleet, planner, shadow, admission, audit, now, room)
        salter = Salter(settings.secret, self._keys is not None, settings.gates)
        self._client = ClusterClient(config, pipeline, salter)
        policies = PolicyAdmin(self._in_force, shadow)
        probing = Probing(self.fleet, warm_body(), random.Random(), now)
        decisions = Decisions(audit.records, scribe)
        told = (self.fleet, decisions, registry, self._keys, policies, salter, vault, probing)
        self._admin = Admin(*told, targets).app()

    def _followed(
        self, name: str, directory: Directory, connect: Connect, now: Callable[[], float]
    ) -> Fleet:
        """The replicas, with what earlier clusters knew of them."""

        def link(replica: Replica, member: Member) -> Link:
            return connect(replica.address, name, member)

        book = curve_book.read(self._curves) if self._curves else curve_book.Book()
        expects, retry_s = self._settings.wanted[Role.PREFILL] > 0, self._settings.retry_s
        rng = random.Random()
        return Fleet(directory, link, self._line, warm_body(), now, rng, expects, book, retry_s)

    def _register(self) -> None:
        for collector in (FleetMetrics, ReplicaMetrics, CurveMetrics):
            self.registry.register(collector(self.fleet))
        self.registry.register(PoolMetrics(self.fleet, self._vault, self._settings.wanted))
        self.registry.register(self._vault)

    async def check_health(self) -> None:
        """Raise once requests would no longer be answered."""
        await self._client.check_health()

    async def serve(self) -> None:
        """Listen, and follow the fleet; on cancellation requests may finish for `drain_s`."""
        app = await self._app()
        freeze_start()
        # A restarted ingress serves nothing under an order that is over.
        await self._in_force.look()
        background = [asyncio.create_task(self._watch())]
        background.append(asyncio.create_task(self._in_force.follow()))
        try:
            # It may share its port with others: what came to it before would be refused.
            await self.fleet.anybody(Role.DECODE, _LISTENS_WITHIN_S)
            await self._listen(app, background)
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            self.fleet.close()
            if self._log is not None:
                await asyncio.to_thread(self._log.close, _LOG_ENDS_S)

    async def _listen(self, app: App, background: Sequence[asyncio.Task[None]]) -> None:
        """Until cancelled, or a task ends on which all depends."""
        with _listening(self._settings.host, self._settings.port) as sock:
            server = _server(app, self._settings)
            self._state.server = server  # vLLM's handlers of errors look there
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            try:
                tasks = {serving, *background}
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)

    async def _watch(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.fleet.watch())
            tasks.create_task(self._line.watch())
            tasks.create_task(self._vault.watch())
            if self._curves is not None:
                tasks.create_task(curve_book.follow(self._curves, self.fleet.book))

    async def _app(self) -> App:
        tell_tiers()
        vllm_app = build_app(self._args, ("generate",), self._client.model_config)
        self._state = vllm_app.state
        await init_app_state(self._client, vllm_app.state, self._args, ("generate",))
        settings = self._settings
        ledger = SharedLedger(self._line, asyncio.get_running_loop().time)
        bounds = (settings.max_body_bytes, settings.request_timeout_s)
        guard = Guard(vllm_app, *bounds, self._keys, ledger, self._admissions)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            ours = scope["type"] == "http" and scope["path"].startswith(PATHS)
            await (self._admin if ours else guard)(scope, receive, send)

        return app


def _prices(settings: IngressSettings) -> Prices:
    return Prices(
        settings.assumed_streams,
        settings.compute_price,
        settings.moving_price,
        settings.session_slack,
        settings.fetch_tokens,
        settings.overrun,
        settings.hysteresis,
        settings.displaced_price,
    )


def _server(app: App, settings: IngressSettings) -> QuietServer:
    return QuietServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(settings.drain_s),
            ssl_certfile=settings.tls_cert_file,
            ssl_keyfile=settings.tls_key_file,
        )
    )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket that several ingress replicas of one node may share."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(2048)
        sock.setblocking(False)
        yield sock
