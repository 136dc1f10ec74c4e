"""What operators read over HTTP: health, metrics, replicas, decisions, curves; and what they
change."""

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from msgspec import Meta
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from router.access import KeyRing
from router.changes import changing
from router.curves import curves_of
from router.decisions import Decisions
from router.errors import AccessError
from router.fleet import Fleet
from router.forget import forget
from router.guard import bearer
from router.orders import Change
from router.policy_admin import EXAMPLE, PolicyAdmin
from router.probing import Probing
from router.report import catalogue_row, forgotten_report, replica_row
from router.salt import Salter
from router.targets import TargetDirectory, Targets, targets_of
from router.vault import VaultView

Answer = Callable[[Request], Awaitable[Response]]

PATHS = ("/healthz", "/readyz", "/metrics", "/admin/")


class ProbeOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /admin/curves."""

    budget_s: Annotated[float, Meta(ge=0.1, le=300.0)] = 5.0


class ForgetOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /admin/forget."""

    tenant: str


class ResetOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /admin/reset."""

    replica: str


class Admin:
    """The small app in front of vLLM's; with `keys`, /admin needs an admin key."""

    def __init__(
        self,
        fleet: Fleet,
        decisions: Decisions,
        registry: CollectorRegistry,
        keys: KeyRing | None,
        policies: PolicyAdmin,
        salter: Salter,
        vault: VaultView,
        probing: Probing,
        directory: TargetDirectory,
    ) -> None:
        self._fleet, self._decisions, self._registry = fleet, decisions, registry
        self._keys, self._policies, self._salter = keys, policies, salter
        self._vault, self._probing, self._others = vault, probing, Targets(directory)

    def app(self) -> Starlette:
        """What answers under `PATHS`."""
        return Starlette(
            routes=[
                *(Route(path, answer) for path, answer in self._open().items()),
                *(Route(path, self._locked(answer)) for path, answer in self._read().items()),
                *(
                    Route(path, self._locked(answer), methods=["POST"])
                    for path, answer in self._changed().items()
                ),
            ]
        )

    def _open(self) -> dict[str, Answer]:
        return {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/metrics/targets": self._targets,
        }

    def _read(self) -> dict[str, Answer]:
        return {
            "/admin/replicas": self._replicas,
            "/admin/decisions": self._decisions.answer,
            "/admin/curves": self._curves,
            "/admin/policy": self._policies.policy,
            "/admin/shadow": self._policies.shadow,
        }

    def _changed(self) -> dict[str, Answer]:
        open_to_all = self._keys is None
        tenant, replica = '{"tenant": "acme"}', '{"replica": "decode-0"}'
        return {
            "/admin/policy": changing(Change, self._policies.order, open_to_all, EXAMPLE),
            "/admin/curves": changing(ProbeOrder, self._probe, open_to_all, '{"budget_s": 5}'),
            "/admin/forget": changing(ForgetOrder, self._forget, open_to_all, tenant),
            "/admin/reset": changing(ResetOrder, self._reset, open_to_all, replica),
        }

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, _: Request) -> Response:
        ready = self._fleet.ready()
        return PlainTextResponse("ready\n" if ready else "no working path\n", 200 if ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _targets(self, _: Request) -> Response:
        own = [*targets_of(self._fleet.members()), *self._vault.targets()]
        found = await self._others.with_others(own)
        if found is None:  # Prometheus goes on with what it knows
            return PlainTextResponse("the directory does not answer\n", 503)
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def _replicas(self, _: Request) -> Response:
        rows = [replica_row(self._fleet, member) for member in self._fleet.members()]
        catalogue = catalogue_row(self._fleet.line)
        vault = self._vault.rows()
        return JSONResponse({"replicas": rows, "catalogue": catalogue, "vault": vault})

    async def _curves(self, request: Request) -> Response:
        points = request.query_params.get("points", "") in ("1", "true")
        return JSONResponse(curves_of(self._fleet, points))

    async def _probe(self, order: ProbeOrder) -> Response:
        counted = await self._probing.probe(order.budget_s)
        names = ("computed", "handed_off", "skipped")
        return JSONResponse({name: counted[name] for name in names})

    async def _forget(self, order: ForgetOrder) -> Response:
        outcomes = await forget(self._fleet.members(), self._salter.tags(order.tenant))
        return JSONResponse(forgotten_report(order.tenant, outcomes))

    async def _reset(self, order: ResetOrder) -> Response:
        member = self._fleet.member(order.replica)
        if member is None:
            message = f"no replica {order.replica} is up; `breakeven status` lists them"
            return JSONResponse({"error": {"message": message, "code": 404}}, 404)
        member.reset()
        return JSONResponse({"replica": order.replica, "state": "asked"}, 202)

    def _locked(self, answer: Answer) -> Answer:
        """`answer` for those who have an admin key."""
        keys = self._keys
        if keys is None:
            return answer

        async def checked(request: Request) -> Response:
            try:
                keys.check_admin(bearer(request.scope))
            except AccessError as error:
                return JSONResponse({"error": {"message": str(error), "code": 401}}, 401)
            return await answer(request)

        return checked
