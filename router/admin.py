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


def admin_app(
    fleet: Fleet,
    decisions: Decisions,
    registry: CollectorRegistry,
    keys: KeyRing | None,
    policies: PolicyAdmin,
    salter: Salter,
    vault: VaultView,
    probing: Probing,
    directory: TargetDirectory,
) -> Starlette:
    """The small app in front of vLLM's; with `keys`, /admin needs an admin key."""
    others = Targets(directory)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        ready = fleet.ready()
        return PlainTextResponse("ready\n" if ready else "no working path\n", 200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def targets(_: Request) -> Response:
        found = await others.with_others([*targets_of(fleet.members()), *vault.targets()])
        if found is None:  # Prometheus goes on with what it knows
            return PlainTextResponse("the directory does not answer\n", 503)
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def replicas(_: Request) -> Response:
        rows = [replica_row(fleet, member) for member in fleet.members()]
        catalogue = catalogue_row(fleet.line)
        return JSONResponse({"replicas": rows, "catalogue": catalogue, "vault": vault.rows()})

    async def curves(request: Request) -> Response:
        points = request.query_params.get("points", "") in ("1", "true")
        return JSONResponse(curves_of(fleet, points))

    async def probe(order: ProbeOrder) -> Response:
        counted = await probing.probe(order.budget_s)
        names = ("computed", "handed_off", "skipped")
        return JSONResponse({name: counted[name] for name in names})

    async def forget_tenant(order: ForgetOrder) -> Response:
        outcomes = await forget(fleet.members(), salter.tags(order.tenant))
        return JSONResponse(forgotten_report(order.tenant, outcomes))

    async def reset_replica(order: ResetOrder) -> Response:
        member = fleet.member(order.replica)
        if member is None:
            message = f"no replica {order.replica} is up; `breakeven status` lists them"
            return JSONResponse({"error": {"message": message, "code": 404}}, 404)
        member.reset()
        return JSONResponse({"replica": order.replica, "state": "asked"}, 202)

    routes = {
        "/healthz": healthz,
        "/readyz": readyz,
        "/metrics": metrics,
        "/metrics/targets": targets,
        "/admin/replicas": replicas,
        "/admin/decisions": decisions.answer,
        "/admin/curves": curves,
        "/admin/policy": policies.policy,
        "/admin/shadow": policies.shadow,
    }
    open_to_all = keys is None
    changes = {
        "/admin/policy": changing(Change, policies.order, open_to_all, EXAMPLE),
        "/admin/curves": changing(ProbeOrder, probe, open_to_all, '{"budget_s": 5}'),
        "/admin/forget": changing(ForgetOrder, forget_tenant, open_to_all, '{"tenant": "acme"}'),
        "/admin/reset": changing(ResetOrder, reset_replica, open_to_all, '{"replica": "decode-0"}'),
    }
    return Starlette(
        routes=[
            *(
                Route(path, _locked(answer, keys), methods=["POST"])
                for path, answer in changes.items()
            ),
            *(
                Route(path, _locked(answer, keys) if path.startswith("/admin") else answer)
                for path, answer in routes.items()
            ),
        ]
    )


def _locked(answer: Answer, keys: KeyRing | None) -> Answer:
    """`answer` for those who have an admin key."""
    if keys is None:
        return answer

    async def checked(request: Request) -> Response:
        try:
            keys.check_admin(bearer(request.scope))
        except AccessError as error:
            return JSONResponse({"error": {"message": str(error), "code": 401}}, 401)
        return await answer(request)

    return checked
