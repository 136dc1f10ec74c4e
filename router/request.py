"""A request as the pipeline sees it: tokens, and opaque bytes for the engine."""

from dataclasses import dataclass, field

from kv.block import TOKEN_BYTES
from router.context import Notes, RequestContext


@dataclass(frozen=True, slots=True)
class Request:
    """One generation call.

    `tokens` is the prompt as packed uint32, `body` what the engine is to do with it (see
    `workers.messages.Submit`). `local_only`: every position must be computed where the answer
    is made, because the prompt's own logprobs were asked for.
    """

    request_id: str
    tokens: bytes
    body: bytes
    salt: str | None
    context: RequestContext
    local_only: bool = False
    notes: Notes = field(default_factory=Notes)

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES
