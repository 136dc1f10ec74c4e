"""What the HTTP side knows of a request and vLLM's serving layer does not pass on.

An ASGI middleware binds a `Bound` for the task that serves a request; `ClusterClient` reads it,
because `EngineClient.generate` sees no headers.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from kv.codecs.codec import CodecName


class ServiceClass(StrEnum):
    """Who waits for the answer: a person, or nobody."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


# Whose requests are while no keys are needed.
DEFAULT_TENANT = "default"

# OpenAI's `prompt_cache_retention`; "in_memory" asks for what is usual.
RETENTION_S = {"24h": 86_400.0}

# OpenAI's service tiers. `auto` asks for what the tenant's key says, as a request without one does.
AUTO = "auto"
CLASS_OF_TIER = {
    "default": ServiceClass.INTERACTIVE,
    "scale": ServiceClass.INTERACTIVE,
    "priority": ServiceClass.INTERACTIVE,
    "flex": ServiceClass.BATCH,
    # Anthropic's word for what is not to be prioritized.
    "standard_only": ServiceClass.INTERACTIVE,
}
# And how an answer says what was used.
TIER_OF_CLASS = {ServiceClass.INTERACTIVE: "default", ServiceClass.BATCH: "flex"}


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One HTTP request: who asks, how urgently, and under which name it is cached.

    After `timeout_s` it is ended wherever it is. `codec` is the one that it allows its stored
    blocks to lose precision by; None allows none. A vault keeps them for `retention_s`, or for as
    long as it keeps any.
    """

    request_id: str
    tenant: str = DEFAULT_TENANT
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    cache_key: str | None = None
    safety_identifier: str | None = None
    timeout_s: float | None = None
    codec: CodecName | None = None
    retention_s: float | None = None


@dataclass(slots=True)
class Notes:
    """What the pipeline tells the HTTP side. The plan is there before the first byte of the body;
    `used_tokens` grows to the end: prompt and generated tokens, of every choice of the call.
    `reserved` places of the ingress are kept for requests of the call that have yet to begin."""

    plan: str | None = None
    used_tokens: int = 0
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class Bound:
    """A request's context, and where its response headers come from."""

    context: RequestContext
    notes: Notes


bound: ContextVar[Bound | None] = ContextVar("breakeven_request", default=None)
