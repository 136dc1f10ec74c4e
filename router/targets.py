"""Where the cluster's processes answer Prometheus, in the form of its HTTP service discovery."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from router.member import Member

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0


class Target(msgspec.Struct, frozen=True):
    """One process; `targets` has one address, host and port."""

    targets: list[str]
    labels: dict[str, str]


class TargetRecord(msgspec.Struct, frozen=True):
    """The record in the directory of a process that is neither replica nor shard; `beat` grows
    with each renewal. Its labels are no label of its metrics, which Prometheus would rename."""

    target: Target
    epoch: str
    beat: int


class TargetDirectory(Protocol):
    """Where ingresses and catalogues tell of their endpoints."""

    async def targets(self) -> Sequence[Target]:
        """Every one told of now; raises OSError while the directory cannot be reached."""
        ...


class Targets:
    """All targets that are known here. A directory that does not answer takes none away: whoever
    is told of fewer no longer scrapes the others, just when they are of interest."""

    def __init__(self, directory: TargetDirectory) -> None:
        self._directory = directory
        self._last: Sequence[Target] | None = None

    async def with_others(self, own: Iterable[Target]) -> list[Target] | None:
        """`own`, and what the directory tells of; None while it has never answered."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._last = await self._directory.targets()
        except OSError as error:  # a TimeoutError is one
            logger.warning("targets not looked up: %s", error)
        return None if self._last is None else [*own, *self._last]


def target_prefix(cluster: str) -> str:
    """The key prefix of these records of one cluster."""
    return f"metrics/{cluster}/"


def targets_of(members: Iterable[Member]) -> list[Target]:
    """Of the replicas that are known."""
    return [
        Target([replica.metrics_address], {"role": replica.role, "replica": replica.name})
        for replica in (member.replica for member in members)
        if replica.metrics_address
    ]
