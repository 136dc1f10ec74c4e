"""What a request's `kv_transfer_params` say of how its blocks may be stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The fields of `workers.messages.Keep`.
KEEP = "keep"


def yields(params: Mapping[str, Any] | None) -> bool:
    """Whether its blocks may take nobody's place, and are the first to go."""
    return bool((params or {}).get(KEEP, {}).get("yields", False))


@dataclass(slots=True)
class Stored:
    """The state of one request that yields. Once a block was `cut` for want of room, those behind
    it are not stored either: nobody would find them."""

    cut: bool = False
