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
    is told of fewer no longer scrapes the others, just when they are of interest. However many ask,
    the directory is asked once at a time, in the background: it may hang."""

    def __init__(self, directory: TargetDirectory) -> None:
        self._directory = directory
        self._last: Sequence[Target] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def with_others(self, own: Iterable[Target]) -> list[Target] | None:
        """`own`, and what the directory tells of; None while it has never answered."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        done, _ = await asyncio.wait({self._looking}, timeout=_ANSWER_S)
        if not done:
            logger.warning("targets not looked up: no answer in %g s", _ANSWER_S)
        return None if self._last is None else [*own, *self._last]

    async def _look(self) -> None:
        try:
            self._last = await self._directory.targets()
        except OSError as error:
            logger.warning("targets not looked up: %s", error)


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
