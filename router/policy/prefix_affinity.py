"""A baseline: the longest cached prefix wins, whatever the load.

vLLM production-stack's PrefixAwareRouter (routers/routing_logic.py at 008a23b) takes a random one
of those with the longest match. Here they take turns, and where nobody has a hit all do. With
prefill replicas both pools are chosen by prefix: D by what need not be moved to it, P, among those
linked to that D, by what need not be computed. Hot prefixes make hot spots; that is the point of
comparing with it.
"""

from collections.abc import Sequence

from kv.plan import Plan, Reason
from router.policy.question import Question
from router.policy.uncosted import in_turn, plan
from router.snapshot import ReplicaView


def choose(question: Question) -> Plan:
    """The replicas with the longest cached prefix, remote where a P is linked to that D.

    Raises `NoReplicaError` when no decode replica is routable.
    """

    def longest(views: Sequence[ReplicaView]) -> ReplicaView:
        hit = max(view.hit_tokens for view in views)
        return in_turn([view for view in views if view.hit_tokens == hit], question.ticket)

    return plan(question, Reason.PREFIX_AFFINITY, longest, longest)
