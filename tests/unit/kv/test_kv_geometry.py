"""The geometry of a model's KV, whatever config it came from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.errors import SizeError
from kv.geometry import (
    FullAttention,
    Geometry,
    LatentAttention,
    LayerGroup,
    SlidingAttention,
    State,
    StatePart,
    group_bytes,
)

RANKS = (1, 2, 4, 8)

few = st.integers(1, 64)
sizes = st.sampled_from([1, 2, 4])
full = st.builds(FullAttention, few, few, few, sizes)
sliding = st.builds(SlidingAttention, few, few, few, sizes, st.integers(1, 5000))
latent = st.builds(LatentAttention, few, few, sizes)
parts = st.builds(StatePart, few, few, sizes, st.booleans())
states = st.builds(State, few, st.lists(parts, min_size=1, max_size=3).map(tuple))
groups = st.one_of(full, sliding, latent, states)
geometries = st.lists(groups, min_size=1, max_size=4).map(lambda each: Geometry(tuple(each)))
lengths = st.integers(0, 10_000)


@given(geometries, lengths, lengths)
def test_a_longer_request_never_takes_less(geometry: Geometry, one: int, more: int) -> None:
    """request_bytes is monotone, and starts at the state."""
    assert geometry.request_bytes(one) <= geometry.request_bytes(one + more)
    assert geometry.request_bytes(0) == geometry.state_bytes()


@given(geometries, st.integers(1, 10_000))
def test_a_token_adds_between_what_is_left_and_all(geometry: Geometry, tokens: int) -> None:
    """Each token adds `bytes_per_token` at most, `bytes_per_token_past_windows` at least."""
    added = geometry.request_bytes(tokens) - geometry.request_bytes(tokens - 1)
    assert geometry.bytes_per_token_past_windows() <= added <= geometry.bytes_per_token()


@given(sliding, lengths)
def test_a_window_stops_growing(group: SlidingAttention, more: int) -> None:
    """Up to its window it grows like full attention, past it not at all."""
    window = group.window_tokens
    whole = FullAttention(group.layers, group.kv_heads, group.head_dim, group.element_bytes)
    assert group_bytes(group, window) == group_bytes(whole, window)
    assert group_bytes(group, window + more) == group_bytes(group, window)


@given(states, lengths)
def test_a_state_is_fixed(group: State, tokens: int) -> None:
    """However long the request is."""
    assert group_bytes(group, tokens) == group.state_bytes > 0


@given(full, st.sampled_from(RANKS), lengths)
def test_ranks_share_the_heads(group: FullAttention, ranks: int, tokens: int) -> None:
    """All ranks together keep what one would, or a head each where there are fewer heads."""
    if group.kv_heads % ranks and ranks % group.kv_heads:
        with pytest.raises(SizeError, match="KV heads"):
            group.on_rank(ranks)
        return
    replicas = max(1, ranks // group.kv_heads)
    kept = ranks * group_bytes(group.on_rank(ranks), tokens)
    assert kept == replicas * group_bytes(group, tokens)


@given(states, st.sampled_from(RANKS))
def test_a_rank_keeps_its_rows_of_a_state(group: State, ranks: int) -> None:
    """Rows are divided evenly or refused; only what may be replicated is."""
    for part in group.parts:
        if part.rows % ranks == 0:
            assert ranks * part.on_rank(ranks).size_bytes == part.size_bytes
        elif part.replicate and ranks % part.rows == 0:
            assert part.on_rank(ranks).rows == 1
        else:
            with pytest.raises(SizeError, match="rows of state"):
                part.on_rank(ranks)


@given(latent, st.sampled_from(RANKS))
def test_each_rank_keeps_the_whole_latent_vector(group: LatentAttention, ranks: int) -> None:
    """MLA has nothing to divide."""
    assert group.on_rank(ranks) == group


@given(geometries)
def test_one_rank_keeps_everything(geometry: Geometry) -> None:
    """Tensor parallelism of one changes nothing."""
    assert geometry.on_rank(1) == geometry


def test_a_block_is_its_tokens() -> None:
    """32 tokens of SmolLM2-135M in fp32 are 1.44 MB."""
    geometry = Geometry((FullAttention(30, 3, 64, 4),))
    assert geometry.block_bytes(32) == 32 * 45 * 1024


@pytest.mark.parametrize(
    "build",
    [
        lambda: FullAttention(0, 8, 128, 2),
        lambda: FullAttention(32, 0, 128, 2),
        lambda: FullAttention(32, 8, -1, 2),
        lambda: SlidingAttention(32, 8, 128, 2, 0),
        lambda: LatentAttention(61, 576, 0),
        lambda: StatePart(0, 1, 1),
        lambda: State(1, ()),
        lambda: Geometry(()),
        lambda: Geometry((FullAttention(1, 1, 1, 1),)).on_rank(0),
        lambda: Geometry((FullAttention(1, 1, 1, 1),)).block_bytes(0),
        lambda: Geometry((FullAttention(1, 1, 1, 1),)).request_bytes(-1),
    ],
)
def test_a_factor_that_was_not_read_is_refused(build: object) -> None:
    """A size of zero would make every transfer look free."""
    with pytest.raises(SizeError):
        build()  # type: ignore[operator]


def test_groups_are_what_the_protocol_asks_for() -> None:
    """A geometry may mix them."""
    mixed: tuple[LayerGroup, ...] = (
        FullAttention(1, 2, 3, 2),
        SlidingAttention(1, 2, 3, 2, 10),
        LatentAttention(1, 5, 2),
        State(2, (StatePart(3, 4, 2),)),
    )
    geometry = Geometry(mixed)
    assert geometry.bytes_per_token() == 24 + 24 + 10
    assert geometry.bytes_per_token_past_windows() == 24 + 10
    assert geometry.state_bytes() == 48
    assert geometry.request_bytes(100) == 48 + 34 * 100 + 24 * 10
