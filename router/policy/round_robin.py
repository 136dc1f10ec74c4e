"""A baseline: replicas take turns, by name; neither load, costs nor caches are looked at.

The turn is the question's ticket, so equal questions get equal plans. Each pool turns by itself.
"""

from collections.abc import Sequence

from kv.plan import Plan, Reason
from router.policy.question import Question
from router.policy.uncosted import in_turn, plan
from router.snapshot import ReplicaView


def choose(question: Question) -> Plan:
    """The D whose turn it is, and of the P linked to it the one whose turn it is.

    Raises `NoReplicaError` when no decode replica is routable.
    """

    def turn(views: Sequence[ReplicaView]) -> ReplicaView:
        return in_turn(views, question.ticket)

    return plan(question, Reason.ROUND_ROBIN, turn, turn)
