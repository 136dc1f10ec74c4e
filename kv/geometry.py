"""How many bytes of KV a model's tokens and requests take.

A model is a few groups of layers that keep the same thing. What grows with the request (keys and
values, or MLA's latent vector) counts a token; what does not (the state of linear attention or
mamba layers) counts a request. Layers with a sliding window stop growing at their window. The
formulas are FACTS.md's, "Formulas"; sizes are what vLLM 0.32 lays out, before it pads the pages of
hybrid models to one length.
"""

from dataclasses import astuple, dataclass, replace
from typing import Protocol, Self

from kv.errors import SizeError


class LayerGroup(Protocol):
    """Layers that keep the same thing."""

    @property
    def layers(self) -> int: ...

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token adds, over the group's layers, inside the window."""

    @property
    def window_tokens(self) -> int | None:
        """Tokens past which the group stops growing; None for all of a request."""

    @property
    def state_bytes(self) -> int:
        """Bytes that a request takes however long it is."""

    def on_rank(self, ranks: int) -> Self:
        """What one of `ranks` tensor-parallel ranks keeps. Raises SizeError if it cannot split."""


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Keys and values of every token (MHA, GQA, MQA): 2 * kv_heads * head_dim elements a layer."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    def __post_init__(self) -> None:
        _check("full attention", *astuple(self))

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def window_tokens(self) -> int | None:
        return None

    @property
    def state_bytes(self) -> int:
        return 0

    def on_rank(self, ranks: int) -> Self:
        """The KV heads are divided; fewer heads than ranks are replicated."""
        return replace(self, kv_heads=_share("KV heads", self.kv_heads, ranks, replicate=True))


@dataclass(frozen=True, slots=True)
class SlidingAttention:
    """Keys and values of the last `window_tokens` tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    window_tokens: int

    def __post_init__(self) -> None:
        _check("sliding attention", *astuple(self))

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def state_bytes(self) -> int:
        return 0

    def on_rank(self, ranks: int) -> Self:
        """As `FullAttention.on_rank`."""
        return replace(self, kv_heads=_share("KV heads", self.kv_heads, ranks, replicate=True))


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA: one latent vector and one rotary key a token and layer, for all heads together."""

    layers: int
    latent_dim: int
    element_bytes: int

    def __post_init__(self) -> None:
        _check("latent attention", *astuple(self))

    @property
    def token_bytes(self) -> int:
        return self.layers * self.latent_dim * self.element_bytes

    @property
    def window_tokens(self) -> int | None:
        return None

    @property
    def state_bytes(self) -> int:
        return 0

    def on_rank(self, ranks: int) -> Self:
        """Every rank needs the whole vector."""
        return self


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a layer's state: `rows` (heads, channels, groups) that ranks divide among them.

    With `replicate`, rows that are fewer than the ranks are kept by several of them.
    """

    rows: int
    row_elements: int
    element_bytes: int
    replicate: bool = False

    def __post_init__(self) -> None:
        _check("state", self.rows, self.row_elements, self.element_bytes)

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_elements * self.element_bytes

    def on_rank(self, ranks: int) -> Self:
        return replace(self, rows=_share("rows of state", self.rows, ranks, self.replicate))


@dataclass(frozen=True, slots=True)
class State:
    """Linear attention or mamba: a state of fixed size a layer and request."""

    layers: int
    parts: tuple[StatePart, ...]

    def __post_init__(self) -> None:
        _check("state", self.layers, len(self.parts))

    @property
    def token_bytes(self) -> int:
        return 0

    @property
    def window_tokens(self) -> int | None:
        return None

    @property
    def state_bytes(self) -> int:
        return self.layers * sum(part.size_bytes for part in self.parts)

    def on_rank(self, ranks: int) -> Self:
        return replace(self, parts=tuple(part.on_rank(ranks) for part in self.parts))


@dataclass(frozen=True, slots=True)
class Geometry:
    """All of a model's groups, on one rank or on a model that is not split."""

    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise SizeError("KV geometry", "0 layers", "give at least one group of layers")

    def bytes_per_token(self) -> int:
        """Bytes that one more token adds while every layer still grows."""
        return sum(group.token_bytes for group in self.groups)

    def bytes_per_token_past_windows(self) -> int:
        """Bytes that one more token adds behind the longest window."""
        return sum(group.token_bytes for group in self.groups if group.window_tokens is None)

    def state_bytes(self) -> int:
        """Bytes that a request takes before its first token."""
        return sum(group.state_bytes for group in self.groups)

    def block_bytes(self, block_tokens: int) -> int:
        """Bytes of a block's pages over all layers. Raises SizeError below 1 token."""
        _check("block", block_tokens)
        return self.bytes_per_token() * block_tokens

    def request_bytes(self, n_tokens: int) -> int:
        """Bytes that a request of `n_tokens` holds. Raises SizeError below 0 tokens."""
        if n_tokens < 0:
            raise SizeError("request", f"{n_tokens} tokens", "give 0 or more")
        return sum(group_bytes(group, n_tokens) for group in self.groups)

    def on_rank(self, ranks: int) -> "Geometry":
        """What each of `ranks` tensor-parallel ranks keeps. Raises SizeError if a group cannot be
        split evenly."""
        _check("tensor parallelism", ranks)
        return Geometry(tuple(group.on_rank(ranks) for group in self.groups))


def group_bytes(group: LayerGroup, n_tokens: int) -> int:
    """Bytes that a request of `n_tokens` holds in one group."""
    window = group.window_tokens
    kept = n_tokens if window is None else min(n_tokens, window)
    return group.state_bytes + group.token_bytes * kept


def _share(what: str, count: int, ranks: int, replicate: bool) -> int:
    if count % ranks == 0:
        return count // ranks
    if replicate and ranks % count == 0:
        return 1
    evenly = "neither divides the other" if replicate else "not a whole number each"
    raise SizeError(
        "tensor parallelism",
        f"{count} {what} on {ranks} ranks, {evenly}",
        f"choose a number of ranks that divides {count}",
    )


def _check(subject: str, *counts: int) -> None:
    if min(counts) < 1:
        shape = ", ".join(map(str, counts))
        raise SizeError(subject, f"a shape of {shape}", "give each from the config, at least 1")
