"""The head of a split, as the engine that fetches the tail sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# In a request's kv_transfer_params: how many of the prompt's first tokens its peer computes for it.
HEAD_TOKENS = "head_tokens"


# A waiting engine steps a thousand times a second. So often it looks at the whole prompt: for 128
# blocks that takes it about a millisecond.
LOOK_EVERY_S = 0.005


@dataclass(slots=True)
class Head:
    """Tokens [0, `end_token`) of one request's prompt. `missed` are blocks among them that the peer
    will not bring: those are looked for where the tail comes from."""

    end_token: int
    missed: set[bytes] = field(default_factory=set)
    _again_s: float = 0.0
    _step: int = -1
    _first: bytes = b""
    _rests: bool = False

    def rests(self, key: bytes, step: int, now_s: float) -> bool | None:
        """Whether the engine's `step` is one in which nothing is looked up; None for the block that
        it asks for first in such a step, which says that there is something to wait for."""
        if step != self._step:
            self._step, self._first = step, key
            self._rests = now_s < self._again_s
            if not self._rests:
                self._again_s = now_s + LOOK_EVERY_S
        return None if self._rests and key == self._first else self._rests

    def is_peers(self, key: bytes, end_token: int | None) -> bool:
        """Whether the block that ends there is the peer's to bring."""
        return end_token is not None and end_token <= self.end_token and key not in self.missed


def head_of(params: Mapping[str, Any] | None) -> Head | None:
    """That of a request with these `kv_transfer_params`; None for one that is not split."""
    tokens = (params or {}).get(HEAD_TOKENS)
    return Head(tokens) if isinstance(tokens, int) and tokens > 0 else None
