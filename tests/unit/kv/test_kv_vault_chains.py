"""Where a request's blocks lie in a vault."""

from hypothesis import given
from hypothesis import strategies as st

from kv.vault.chains import RUN_BLOCKS, Chains, group_of

TOKENS = {0: 16, 3: 32}


def key(number: int, group: int) -> bytes:
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


def ends(counts: dict[int, int]) -> dict[bytes, int]:
    """Blocks of a request by key, with the token behind each, as vLLM tells them."""
    return {
        key(1000 * group + at, group): (at + 1) * TOKENS[group]
        for group, count in counts.items()
        for at in range(count)
    }


counted = st.fixed_dictionaries({0: st.integers(0, 200), 3: st.integers(0, 100)})


@given(counted)
def test_every_block_is_in_the_run_that_its_spot_names(counts: dict[int, int]) -> None:
    """A run is RUN_BLOCKS of one group in order, and each block's parent is the one before it."""
    chains, told = Chains(TOKENS), ends(counts)
    chains.extend(told)
    runs = chains.runs()
    assert sorted(k for run in runs.values() for k in run) == sorted(told)
    assert len(chains) == len(told)
    for run, members in runs.items():
        assert members[0] == run
        assert len(members) <= RUN_BLOCKS
    for each, end_token in told.items():
        spot, tokens = chains.spot(each, end_token), TOKENS[group_of(each)]
        assert each in runs[spot.run]
        assert (spot.start_token, spot.end_token) == (end_token - tokens, end_token)
        number = int.from_bytes(each[:32], "big")
        before = key(number - 1, group_of(each)) if spot.start_token else None
        assert spot.parent == before


@given(counted, st.integers(0, 300))
def test_a_growing_request_keeps_its_spots(counts: dict[int, int], cut: int) -> None:
    """What is told in two parts gives what is told at once."""
    told = ends(counts)
    grown, whole = Chains(TOKENS), Chains(TOKENS)
    first = dict(list(told.items())[:cut])
    grown.extend(first)
    for each, end_token in first.items():
        grown.spot(each, end_token)
    grown.extend(told)
    whole.extend(told)
    assert grown.runs() == whole.runs()


def test_prompts_that_begin_alike_share_their_first_runs() -> None:
    """So one finds the other's blocks on the shard that it asks."""
    mine, others = Chains(TOKENS), Chains(TOKENS)
    mine.extend({key(at, 0): 16 * (at + 1) for at in range(150)})
    common = {key(at, 0): 16 * (at + 1) for at in range(100)}
    others.extend({**common, **{key(9000 + at, 0): 16 * (101 + at) for at in range(50)}})
    first, second = list(mine.runs())[:2]
    assert list(others.runs())[:2] == [first, second]
    assert mine.spot(key(99, 0), 1600).run == others.spot(key(99, 0), 1600).run == second


def test_a_part_of_a_block_lies_with_the_block_that_it_is_of() -> None:
    """vLLM may name the end of a prompt that fills no block; nothing comes behind it."""
    chains = Chains(TOKENS)
    chains.extend({key(0, 0): 16, key(1, 0): 32, key(77, 0): 40})
    spot = chains.spot(key(77, 0), 40)
    assert spot.run == key(0, 0)
    assert spot.parent == key(1, 0)
    assert (spot.start_token, spot.end_token) == (32, 40)
    assert len(chains) == 2
