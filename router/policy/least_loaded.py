"""The kill switch: the least loaded replicas, and neither costs nor caches are looked at.

What an operator falls back to when the policy in force misbehaves, so it counts requests and queued
tokens only. Without prefill replicas it is plain least-loaded routing over equal engines.
"""

from collections.abc import Sequence

from kv.plan import Plan, Reason
from router.policy.question import Question
from router.policy.uncosted import plan
from router.snapshot import ReplicaView


def choose(question: Question) -> Plan:
    """D with the fewest requests, and P, if one is linked to it, with the fewest queued tokens.

    Raises `NoReplicaError` when no decode replica is routable.
    """
    return plan(question, Reason.LEAST_LOADED, _least_requests, _least_queued)


def _least_requests(decode: Sequence[ReplicaView]) -> ReplicaView:
    """Running and waiting requests count alike; ties by queued tokens, then by name."""
    return min(
        decode, key=lambda view: (view.running + view.waiting, view.queued_tokens, view.name)
    )


def _least_queued(prefill: Sequence[ReplicaView]) -> ReplicaView:
    return min(prefill, key=lambda view: (view.queued_tokens, view.waiting, view.name))
