"""Under which names a request runs that allows a lossy codec."""

from dataclasses import replace

import pytest

from kv.plan import Plan, Reason, Rival, Shape, Source, Span
from router.policy.names import exact_if_cheaper
from router.policy.pair import MAX_RIVALS


def plan(cost_s: float, rivals: int = 0) -> Plan:
    return Plan(
        Shape.LOCAL,
        Reason.CHEAPER_LOCAL,
        None,
        "decode-0",
        (Span(Source.COMPUTE, 0, 64, "decode-0"),),
        cost_s / 2,
        cost_s,
        (Rival(Shape.LOCAL, None, "decode-1", 2.0, 2.0),) * rivals,
    )


@pytest.mark.parametrize(
    ("lossy_s", "exact_s", "exact"),
    [(1.0, 1.0, False), (1.0, 0.97, False), (1.0, 0.9, True), (1.0, 1.2, False), (0.0, 0.0, False)],
)
def test_exact_names_are_taken_where_they_cost_less_by_a_margin(
    lossy_s: float, exact_s: float, exact: bool
) -> None:
    """Of near equals the codec's own: what is stored under them is smaller to fetch next time. A
    policy that prices nothing never changes names."""
    assert (exact_if_cheaper(plan(lossy_s), plan(exact_s), 0.05) is not None) is exact


def test_the_plan_says_so_and_what_was_beaten() -> None:
    """The reason is its own, and the first rival is what the codec's names would have cost."""
    taken = exact_if_cheaper(plan(1.0), plan(0.5, rivals=MAX_RIVALS), 0.05)
    assert taken is not None
    assert taken.reason is Reason.EXACT_NAMES
    assert taken.rivals[0] == Rival(Shape.LOCAL, None, "decode-0", 0.5, 1.0)
    assert len(taken.rivals) == MAX_RIVALS


def test_a_curve_that_is_tried_is_not_compared() -> None:
    """What is tried costs more than the best on purpose."""
    tried = replace(plan(1.0), reason=Reason.EXPLORED)
    assert exact_if_cheaper(tried, plan(0.5), 0.05) is None
