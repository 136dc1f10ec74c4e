"""A request as the pipeline sees it: tokens, and opaque bytes for the engine."""

from dataclasses import dataclass, field, replace

from kv.block import TOKEN_BYTES
from router.context import Notes, RequestContext
from workers.messages import Keep


@dataclass(frozen=True, slots=True)
class Names:
    """What a request's blocks are called and how they are kept: `salt`, which engines find in
    `body`, and `keep`."""

    salt: str | None
    body: bytes
    keep: Keep | None


@dataclass(frozen=True, slots=True)
class Request:
    """One generation call.

    `tokens` is the prompt as packed uint32, `body` what the engine is to do with it (see
    `workers.messages.Submit`). `local_only`: every position must be computed where the answer
    is made, because the prompt's own logprobs were asked for. `answered` are tokens of the
    answer that were streamed before a replica was lost; `uncarried` names what could not go on
    elsewhere behind them. `keep` is how its blocks may be stored. `max_tokens` bounds its answer. A
    batch request gives way to others until `patient_until_s` of the ingress's clock. One that
    allows a lossy codec may be run under its `exact` names as well, until one or the other is
    settled.
    """

    request_id: str
    tokens: bytes
    body: bytes
    salt: str | None
    context: RequestContext
    local_only: bool = False
    notes: Notes = field(default_factory=Notes)
    answered: bytes = b""
    uncarried: str | None = None
    keep: Keep | None = None
    max_tokens: int | None = None
    patient_until_s: float | None = None
    exact: Names | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the next one of the answer."""
        return len(self.known) // TOKEN_BYTES

    @property
    def known(self) -> bytes:
        """The prompt and what was answered, packed."""
        return self.tokens + self.answered

    def patience_s(self, now_s: float) -> float | None:
        """How long it still gives way to others; None once it is as urgent as any."""
        if self.patient_until_s is None or now_s >= self.patient_until_s:
            return None
        return self.patient_until_s - now_s

    def behind(self, answered: bytes) -> "Request":
        """The same request, some of whose answer was given; prompt logprobs were among it."""
        return replace(self, answered=answered, local_only=False)

    def under(self, names: Names) -> "Request":
        """The same request under names that are settled."""
        return replace(self, salt=names.salt, body=names.body, keep=names.keep, exact=None)

    def settled(self) -> "Request":
        """The same request under the names that it has."""
        return self if self.exact is None else replace(self, exact=None)
