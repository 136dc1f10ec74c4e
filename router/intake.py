"""What a client sent, read and made harmless before vLLM sees it.

Everything that a client could steer the cluster with is removed here; the rest of the body reaches
vLLM as it was sent.
"""

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

from kv.codecs.codec import CodecName
from router.asgi import Message, Receive, Scope
from router.context import (
    AUTO,
    CLASS_OF_TIER,
    RETENTION_S,
    TIER_OF_CLASS,
    RequestContext,
    ServiceClass,
)

Headers = Iterable[tuple[bytes, bytes]]

# What vLLM's app serves through us; everything else it mounts stays unreachable.
ROUTES = {
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/responses": {"POST"},
    "/v1/messages": {"POST"},
    "/v1/messages/count_tokens": {"POST"},
    "/v1/models": {"GET"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/version": {"GET"},
}
# Those that generate, to which tenants' limits apply.
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
# Its answers repeat the tier that was asked for; they are to say the one that was used.
_RESPONSES = "/v1/responses"
_NOT_SERVED = {
    "/v1/embeddings": "embeddings",
    "/v1/images/generations": "images",
    "/v1/audio/transcriptions": "audio",
    "/v1/audio/speech": "audio",
    "/v1/rerank": "reranking",
    "/v1/load_lora_adapter": "LoRA adapters",
}
# Fields by which a body could reach into engines, caches or queues.
_STEERING = (
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_hints",
    "priority",
    "session_id",
    "data_parallel_rank",
    "request_id",
    "vllm_xargs",
)
# vLLM looks into these before it has checked that they are objects.
_OBJECTS = ("structured_outputs",)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Refusal(Exception):
    status: int
    message: str
    kind: str = "BadRequestError"
    headers: Headers = ()


def entered(
    request_id: str, body: bytes, path: str = "", usual: ServiceClass = ServiceClass.INTERACTIVE
) -> tuple[RequestContext, bytes]:
    """The request's context, and its body without what steers the cluster. Its class is the
    tenant's `usual` one where it asks for none."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 at byte {error.start}") from error
    try:
        # The parser of vLLM's app: a stricter one would let past what it cannot read.
        fields = json.loads(body)
    except RecursionError as error:
        raise Refusal(400, "the body is nested too deeply") from error
    except ValueError:
        return RequestContext(request_id, service_class=usual), body  # vLLM words the error
    if not isinstance(fields, dict):
        return RequestContext(request_id, service_class=usual), body
    _check_objects(fields)
    context = RequestContext(
        request_id=request_id,
        service_class=_service_class(fields.get("service_tier"), usual),
        cache_key=_text(fields, "prompt_cache_key"),
        safety_identifier=_text(fields, "safety_identifier"),
        retention_s=RETENTION_S.get(_text(fields, "prompt_cache_retention") or ""),
    )
    changed = [fields.pop(name) for name in _STEERING if name in fields]
    if path == _RESPONSES and fields.get("service_tier") != TIER_OF_CLASS[context.service_class]:
        changed.append("service_tier")
        fields["service_tier"] = TIER_OF_CLASS[context.service_class]
    return context, json.dumps(fields).encode() if changed else body


def _check_objects(fields: dict[str, Any]) -> None:
    for name in _OBJECTS:
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise Refusal(400, f"{name} is a JSON {type(value).__name__}; an object is wanted")


def check_route(method: str, path: str) -> None:
    allowed = ROUTES.get(path)
    if allowed is None:
        what = _NOT_SERVED.get(path)
        served = f"{what} are not served: this cluster generates text" if what else "no such route"
        raise Refusal(404, f"{method} {path}: {served}", "NotFoundError")
    if method not in allowed:
        raise Refusal(405, f"{method} {path}: use {', '.join(sorted(allowed))}")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "the client left before its request was read")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body"):
            return b"".join(chunks)


def _too_large(size: int, limit: int) -> Refusal:
    return Refusal(413, f"a body of {size} bytes, {limit} allowed", "RequestEntityTooLarge")


def replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # what follows a body is the disconnect
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def resized(scope: Scope, body: bytes) -> Scope:
    """`scope` with the length of the body that is replayed."""
    kept = [(k, v) for k, v in scope["headers"] if k not in _BODY_HEADERS and k not in _STEERING_H]
    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}


_BODY_HEADERS = (b"content-length", b"transfer-encoding")
# And the client's key, which nothing behind this layer needs.
_STEERING_H = (
    b"x-data-parallel-rank",
    b"x-vllm-priority",
    b"x-session-id",
    b"x-request-id",
    b"authorization",
    b"x-api-key",
)


def request_id_of(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def timeout_of(scope: Scope, most_s: float | None) -> float | None:
    """What the client's x-request-timeout asks for, at most what is configured."""
    given = dict(scope["headers"]).get(b"x-request-timeout", b"").decode("latin-1")
    if not given:
        return most_s
    try:
        asked_s = float(given)
    except ValueError:
        asked_s = nan
    if not (isfinite(asked_s) and asked_s > 0):
        raise Refusal(400, f"x-request-timeout is {given[:40]!r}; give seconds above 0")
    return asked_s if most_s is None else min(asked_s, most_s)


def codec_of(scope: Scope) -> CodecName | None:
    """The codec by which the client lets its stored blocks lose precision: x-breakeven-codec."""
    given = dict(scope["headers"]).get(b"x-breakeven-codec", b"").decode("latin-1")
    if not given:
        return None
    try:
        return CodecName(given.lower())
    except ValueError as error:
        known = ", ".join(CodecName)
        raise Refusal(400, f"x-breakeven-codec is {given[:40]!r}; give one of {known}") from error


def _service_class(tier: object, usual: ServiceClass) -> ServiceClass:
    if tier is None or tier == AUTO:
        return usual
    found = CLASS_OF_TIER.get(tier) if isinstance(tier, str) else None
    if found is None:
        given = repr(tier)[:40] if isinstance(tier, str) else f"a JSON {type(tier).__name__}"
        known = ", ".join((AUTO, *CLASS_OF_TIER))
        raise Refusal(400, f"service_tier is {given}; give one of {known}")
    return found


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None
