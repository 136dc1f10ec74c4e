"""The baselines that fetch by a fixed rule."""

from dataclasses import replace

import pytest

from kv.catalogue import Tier
from kv.curve import LinkCurve, PrefillCurve
from kv.plan import Hints, Plan, Reason, Shape, Source, Span
from router.policy import threshold
from router.policy.question import Question
from router.snapshot import ReplicaView, Snapshot, TierView

CURVE = PrefillCurve(0.0, 0.001, 0.0)
TOKEN_BYTES = 1000
# Ten times as slow as computing: a fixed rule does not look.
SLOW = LinkCurve(0.0, 0.01 / TOKEN_BYTES)
N = 1000


def asked(hit: int = 0, remote: bool = False, running: int = 1, **held: int) -> Question:
    """A prompt of which a decode replica, or a prefill replica that is linked to one with so many
    streams, has `hit` tokens in its paged KV and these many leading ones in tiers."""
    tiers = tuple(TierView(Tier(name), SLOW, tokens) for name, tokens in held.items())
    here = ReplicaView("x-0", CURVE, 0.02, 0, 0, 0, 0, 32, hit, tiers)
    other = ReplicaView("decode-0", CURVE, 0.02, 0, 0, 0, running, 32, 0)
    if remote:
        links = {("x-0", "decode-0"): LinkCurve(0.0, 0.0)}
        return Question(N, Snapshot((here,), (other,), links, TOKEN_BYTES), 0.5)
    return Question(N, Snapshot((), (here,), {}, TOKEN_BYTES), 0.5)


def fetched(plan: Plan) -> dict[Tier | None, tuple[int, int]]:
    return {s.tier: (s.start_token, s.end_token) for s in plan.spans if s.source is Source.FETCH}


@pytest.mark.parametrize(
    ("least", "hit", "held", "fetches"),
    [(512, 0, 511, False), (512, 0, 512, True), (512, 1, 512, False), (1, 511, 512, True)],
)
def test_a_threshold_counts_what_need_not_be_computed(
    least: int, hit: int, held: int, fetches: bool
) -> None:
    """What the paged KV has already does not count, and costs do not."""
    plan = threshold.choose(replace(asked(hit, vault=held), fetch_tokens=least))
    assert fetched(plan) == ({Tier.VAULT: (hit, held)} if fetches else {})
    assert plan.reason is Reason.THRESHOLD


def test_always_is_always_and_never_is_never() -> None:
    """One block is enough for the one and a whole prompt not for the other; a fetch may take its
    time, and what is to be computed is loaded by nobody."""
    plan = threshold.always_fetch(asked(vault=32))
    assert (plan.shape, plan.reason) == (Shape.FETCH, Reason.ALWAYS_FETCH)
    assert plan.hints.reach_tokens == 32
    assert (plan.hints.deadline_s or 0.0) > 60.0
    plan = threshold.always_compute(asked(64, vault=N))
    assert (plan.shape, plan.reason) == (Shape.LOCAL, Reason.ALWAYS_COMPUTE)
    assert plan.hints == Hints(64)
    assert fetched(threshold.always_fetch(replace(asked(vault=640), local_only=True))) == {}


def test_tiers_continue_one_another_in_the_order_in_which_they_are_asked() -> None:
    """Each brings what those before it lack, and the last token is computed in any case."""
    plan = threshold.always_fetch(asked(100, vault=N, host=300, disk=200))
    assert plan.spans == (
        Span(Source.HIT, 0, 100, "x-0"),
        Span(Source.FETCH, 100, 300, "x-0", Tier.HOST),
        Span(Source.FETCH, 300, N - 1, "x-0", Tier.VAULT),
        Span(Source.COMPUTE, N - 1, N, "x-0"),
    )
    assert plan.hints.tiers == (Tier.HOST, Tier.VAULT)
    assert plan.predicted_ttft_s == pytest.approx(0.01 * 899 + 0.001)


def test_an_idle_decode_replica_does_without_a_handoff() -> None:
    """A baseline is not made worse than it need be."""
    plan = threshold.always_compute(asked(remote=True, running=0))
    assert (plan.shape, plan.prefill, plan.decode) == (Shape.LOCAL, None, "decode-0")


def test_whoever_computes_fetches() -> None:
    """Behind a link that is the prefill replica."""
    plan = threshold.always_fetch(asked(remote=True, vault=640))
    assert (plan.shape, plan.prefill, plan.decode) == (Shape.FETCH_REMOTE, "x-0", "decode-0")
    assert {span.replica for span in plan.spans} == {"x-0"}
