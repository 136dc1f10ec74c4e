"""What operators read over HTTP: health, metrics, replicas, decisions, curves."""

from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from router.access import KeyRing
from router.audit import Audit, Record, Shadowed
from router.catalogue.wire import Line
from router.errors import AccessError
from router.fleet import Fleet
from router.guard import bearer
from router.member import Member
from router.policy_admin import PolicyAdmin

Answer = Callable[[Request], Awaitable[Response]]

PATHS = ("/healthz", "/readyz", "/metrics", "/admin/")


def admin_app(
    fleet: Fleet,
    audit: Audit,
    registry: CollectorRegistry,
    keys: KeyRing | None,
    policies: PolicyAdmin,
) -> Starlette:
    """The small app in front of vLLM's; with `keys`, /admin needs an admin key."""

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        ready = fleet.ready()
        return PlainTextResponse("ready\n" if ready else "no working path\n", 200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def replicas(_: Request) -> Response:
        rows = [_replica(fleet, member) for member in fleet.members()]
        return JSONResponse({"replicas": rows, "catalogue": _catalogue(fleet.line)})

    async def decisions(_: Request) -> Response:
        return JSONResponse({"decisions": [_decision(record) for record in audit.records]})

    async def curves(_: Request) -> Response:
        return JSONResponse(_curves(fleet))

    routes = {
        "/healthz": healthz,
        "/readyz": readyz,
        "/metrics": metrics,
        "/admin/replicas": replicas,
        "/admin/decisions": decisions,
        "/admin/curves": curves,
        "/admin/policy": policies.policy,
        "/admin/shadow": policies.shadow,
    }
    order = Route("/admin/policy", _locked(policies.order, keys), methods=["POST"])
    return Starlette(
        routes=[
            order,
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


def _replica(fleet: Fleet, member: Member) -> dict[str, Any]:
    replica, load = member.replica, member.load
    warmed = [pair for pair in fleet.pairs.links if member.name in pair]
    return {
        "name": replica.name,
        "role": replica.role,
        "state": "up" if member.up else "down",
        "pid": replica.pid,
        "node": replica.node,
        "running": load.running,
        "waiting": load.waiting,
        "pending_prefill_tokens": load.pending_prefill_tokens,
        "leased": load.leased,
        "kv_usage": round(load.kv_usage, 4),
        "kv_blocks": replica.kv_blocks,
        "cached_blocks": fleet.cached_blocks(member),
        "warmed_pairs": len(warmed),
        "lanes": list(load.lanes),
        "transfer_bytes": load.totals.transfer_bytes,
        "failed_transfers": load.totals.failed_transfers,
        "kv_bytes_per_token": replica.kv_bytes_per_token,
        "max_num_seqs": replica.max_num_seqs,
    }


def _catalogue(line: Line) -> dict[str, Any]:
    beat = line.beat
    return {
        "state": "up" if line.up else "down",
        "pid": beat.pid,
        "blocks": sum(beat.blocks.values()),
        "lag_s": round(beat.lag_s, 6),
    }


def _decision(record: Record) -> dict[str, Any]:
    plan = record.plan
    return {
        "request_id": record.request_id,
        "class": record.service_class,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens(),
        "generated_tokens": record.generated_tokens,
        "outcome": record.outcome if record.ended_at is not None else "running",
        "plan": plan.header(),
        "plans": len(record.plans),
        "shadow": None if record.shadow is None else _shadow(record.shadow),
        "predicted_ttft_s": round(plan.predicted_ttft_s, 6),
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
        "rivals": [
            {
                "shape": rival.shape,
                "prefill": rival.prefill,
                "decode": rival.decode,
                "predicted_ttft_s": round(rival.predicted_ttft_s, 6),
                "cost_s": round(rival.cost_s, 6),
            }
            for rival in plan.rivals
        ],
    }


def _shadow(shadow: Shadowed) -> dict[str, Any]:
    plan = shadow.plan
    return {
        "policy": shadow.policy,
        "outcome": shadow.outcome,
        "plan": None if plan is None else plan.header(),
        "prefill": None if plan is None else plan.prefill,
        "decode": None if plan is None else plan.decode,
        "predicted_ttft_s": None if plan is None else round(plan.predicted_ttft_s, 6),
    }


def _curves(fleet: Fleet) -> dict[str, Any]:
    return {
        "prefill": {
            member.name: {
                "base_s": member.curve.base_s,
                "per_token_s": member.curve.per_token_s,
                "per_token2_s": member.curve.per_token2_s,
                "step_s": member.replica.step_s,
            }
            for member in fleet.members()
        },
        "links": {
            f"{source}->{destination}": {
                "latency_s": link.latency_s,
                "bytes_per_s": None if link.per_byte_s == 0 else 1 / link.per_byte_s,
            }
            for (source, destination), link in fleet.pairs.links.items()
        },
    }
