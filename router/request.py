"""A request as the pipeline sees it: tokens, and opaque bytes for the engine."""

from dataclasses import dataclass, field, replace

from kv.block import TOKEN_BYTES
from router.context import Notes, RequestContext
from workers.messages import Keep


@dataclass(frozen=True, slots=True)
class Request:
    """One generation call.

    `tokens` is the prompt as packed uint32, `body` what the engine is to do with it (see
    `workers.messages.Submit`). `local_only`: every position must be computed where the answer
    is made, because the prompt's own logprobs were asked for. `answered` are tokens of the
    answer that were streamed before a replica was lost; `uncarried` names what could not go on
    elsewhere behind them. `keep` is how its blocks may be stored. `max_tokens` bounds its answer.
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

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the next one of the answer."""
        return len(self.known) // TOKEN_BYTES

    @property
    def known(self) -> bytes:
        """The prompt and what was answered, packed."""
        return self.tokens + self.answered

    def behind(self, answered: bytes) -> "Request":
        """The same request, some of whose answer was given; prompt logprobs were among it."""
        return replace(self, answered=answered, local_only=False)
