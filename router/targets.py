"""Where the cluster's processes answer Prometheus, in the form of its HTTP service discovery."""

from collections.abc import Iterable

import msgspec

from router.member import Member


class Target(msgspec.Struct, frozen=True):
    """One process; `targets` has one address, host and port."""

    targets: list[str]
    labels: dict[str, str]


def targets_of(members: Iterable[Member]) -> list[Target]:
    """Of the replicas that are known."""
    return [
        Target([replica.metrics_address], {"role": replica.role, "replica": replica.name})
        for replica in (member.replica for member in members)
        if replica.metrics_address
    ]
