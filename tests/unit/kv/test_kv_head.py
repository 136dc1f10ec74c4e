"""Which blocks of a split are the peer's to bring."""

import pytest

from kv.head import HEAD_TOKENS, LOOK_EVERY_S, Head, head_of


def test_the_head_ends_with_its_last_block() -> None:
    """A block that ends behind the split is the tail's, and one without a place nobody's."""
    head = Head(64)
    assert [head.is_peers(b"k", end) for end in (32, 64, 65, 96, None)] == [True] * 2 + [False] * 3


def test_what_the_peer_missed_is_no_longer_its_own() -> None:
    """That block alone."""
    head = Head(64)
    head.missed.add(b"a")
    assert [head.is_peers(key, 32) for key in (b"a", b"b")] == [False, True]


def test_a_waiting_engine_looks_at_all_of_it_now_and_then() -> None:
    """A step looks at all blocks or at none; the first then says that the request waits."""
    head = Head(64)
    steps = [head.rests(key, step, 10.0) for step in range(3) for key in (b"a", b"b")]
    assert steps == [False, False, None, True, None, True]
    later_s = 10.0 + LOOK_EVERY_S
    assert [head.rests(key, 3, later_s) for key in (b"a", b"b")] == [False, False]
    assert head.rests(b"b", 4, later_s) is None


@pytest.mark.parametrize("params", [None, {}, {HEAD_TOKENS: 0}, {HEAD_TOKENS: "64"}])
def test_most_requests_are_not_split(params: dict[str, object] | None) -> None:
    """Nothing, no tokens, or nonsense."""
    assert head_of(params) is None


def test_a_request_says_where_its_head_ends() -> None:
    """In its parameters."""
    assert head_of({HEAD_TOKENS: 64}) == Head(64)
