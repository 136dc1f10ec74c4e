"""What replicas that left have counted."""

from router.retired import Counts, Retired
from workers.messages import Totals


def counts(tokens: int, *lanes: str) -> Counts:
    return Counts(lanes, Totals(generated_tokens=tokens, transfer_s=tokens / 2))


def test_however_many_come_and_go_sums_stay_and_little_is_kept() -> None:
    """By their lanes; the oldest are one sum for each."""
    retired = Retired(most=3)
    for number in range(100):
        retired.left(f"epoch-{number}", counts(number, "tcp", *(["rc_mlx5"] * (number % 2))))
    kept = retired.all()
    assert len(kept) == 3 + 2
    assert sum(each.totals.generated_tokens for each in kept) == sum(range(100))
    assert sum(each.totals.transfer_s for each in kept) == sum(range(100)) / 2
    fast = sum(each.totals.generated_tokens for each in kept if "rc_mlx5" in each.lanes)
    assert fast == sum(range(1, 100, 2))


def test_who_only_hung_comes_back_with_its_counts_once() -> None:
    """And may leave again with more of them; somebody new has none."""
    retired = Retired()
    retired.left("a", counts(5, "tcp"))
    assert retired.back("b") is None
    assert retired.back("a") == counts(5, "tcp")
    assert retired.back("a") is None
    assert not retired.all()
    retired.left("a", counts(7, "tcp"))
    retired.left("a", counts(8, "tcp"))
    assert retired.all() == (counts(8, "tcp"),)
