"""One request on a simulated engine."""

from collections import Counter
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from kv.block import TOKEN_BYTES
from kv.catalogue import Tier
from workers.messages import Handoff, Submit
from workers.sim_fetch import Sought
from workers.sim_pages import Grant


@dataclass(slots=True, eq=False)
class Run:
    """One request on one engine. `digest` is of the prompt whose KV it uses; a `concealed` one
    runs on KV from before its tenant was forgotten, and names no blocks. The engine had computed
    `before_tokens` of all prompts when it took this one up. `hoped_tokens` of it are not expected
    to be computed, until it has pages. Once it has `looked`, it waits for what it has `sought`
    behind the host tier, if anything; that was `brought` there, and of the `host_tokens` that were
    taken out of there then so many by tier came from `behind`. It `yields` until `patient_until_s`;
    of its prompt `done_tokens` are computed."""

    submit: Submit
    max_tokens: int
    keys: list[bytes]
    digest: int
    handoff: Handoff | None
    tag: str
    arrived_s: float
    begun_s: float | None = None
    loading_s: float = 0.0
    before_tokens: int = 0
    grant: Grant = field(default_factory=Grant)
    hit_tokens: int = 0
    received_tokens: int = 0
    host_tokens: int = 0
    produced: int = 0
    aborted: bool = False
    concealed: bool = False
    hoped_tokens: int = 0
    looked: bool = False
    sought: Sought | None = None
    brought: dict[bytes, Tier] = field(default_factory=dict)
    behind: Counter[Tier] = field(default_factory=Counter)
    yields: bool = False
    patient_until_s: float = 0.0
    done_tokens: int = 0

    @property
    def spare(self) -> bool:
        """Whether its blocks are the first to go."""
        return self.submit.keep is not None and self.submit.keep.yields

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.tokens + self.submit.answered) // TOKEN_BYTES

    @property
    def answered_tokens(self) -> int:
        """Tokens of the answer that another engine gave."""
        return len(self.submit.answered) // TOKEN_BYTES

    @property
    def had_tokens(self) -> int:
        """Prompt tokens that its pages hold."""
        return self.hit_tokens + self.host_tokens + self.done_tokens

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens that this engine has still to compute; before it has pages, by what it
        had when this came, or what the plan fetches."""
        computes = not self.produced and self.handoff is None
        had = self.had_tokens if self.grant.private else self.hoped_tokens
        return self.prompt_tokens - had if computes else 0


def sim_token(digest: int, position: int) -> int:
    """The token at a position of the answer to the prompt of this digest."""
    return xxh3_64_intdigest(digest.to_bytes(8, "little") + position.to_bytes(4, "little")) >> 33
