"""Every process finds a block at the same shard, and few move when shards come and go."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.errors import VaultError
from kv.placement import place, ranked

some_shards = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8), st.floats(0.1, 10.0), min_size=1, max_size=8
)
some_keys = st.lists(st.binary(min_size=1, max_size=32), max_size=20)


@given(some_shards, some_keys, st.data())
def test_a_shard_that_leaves_gives_away_only_its_own(
    weights: dict[str, float], keys: list[bytes], data: st.DataObject
) -> None:
    """And each of its keys goes to the next in that key's order; a shard that joins is the same
    backwards."""
    gone = data.draw(st.sampled_from(sorted(weights)))
    left = {name: weight for name, weight in weights.items() if name != gone}
    for key in keys if left else []:
        order = ranked(key, weights)
        assert ranked(key, left) == [name for name in order if name != gone]
        assert place(key, left) == (order[1] if order[0] == gone else order[0])


@given(some_shards, some_keys, st.floats(1.0, 5.0), st.data())
def test_a_shard_that_grows_only_gains(
    weights: dict[str, float], keys: list[bytes], factor: float, data: st.DataObject
) -> None:
    """No key moves between the others."""
    grown = data.draw(st.sampled_from(sorted(weights)))
    after = {**weights, grown: weights[grown] * factor}
    for key in keys:
        assert place(key, after) in (place(key, weights), grown)


@given(some_shards, some_keys)
def test_the_order_of_the_shards_does_not_matter(
    weights: dict[str, float], keys: list[bytes]
) -> None:
    """Two processes may have learned of them in another order."""
    backwards = dict(reversed(weights.items()))
    assert [ranked(key, weights) for key in keys] == [ranked(key, backwards) for key in keys]


def test_shards_are_used_by_weight() -> None:
    """Ten thousand keys, one shard of twice the weight: shares are within a tenth of a half and a
    quarter each."""
    weights = {"vault-0": 2.0, "vault-1": 1.0, "vault-2": 1.0}
    counts = Counter(place(at.to_bytes(16, "big"), weights) for at in range(10_000))
    for name, weight in weights.items():
        assert counts[name] == pytest.approx(10_000 * weight / 4.0, rel=0.1)


def test_another_process_places_alike() -> None:
    """Nothing of a process, such as the seed of its own hashes, is in it."""
    keys = [at.to_bytes(16, "big") for at in range(50)]
    weights = {f"vault-{at}": 1.0 + at for at in range(5)}
    code = (
        "from kv.placement import place; "
        f"print([place(at.to_bytes(16, 'big'), {weights!r}) for at in range(50)])"
    )
    root = Path(__file__).resolve().parents[3]
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str([place(key, weights) for key in keys])


@pytest.mark.parametrize("weights", [{}, {"vault-0": 0.0}, {"vault-0": float("inf")}])
def test_a_placement_on_nothing_is_an_error(weights: dict[str, float]) -> None:
    """No shard, or one that could never or always win, says so."""
    with pytest.raises(VaultError, match="placement"):
        place(b"key", weights)
