"""Which replicas there are: who is announced, who answers, who has left."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from kv.errors import KVError
from router.member import Member
from workers.messages import WIRE_VERSION, Load, Replica, Role

logger = logging.getLogger(__name__)

# A replica beats at least once a second; this long without a word and it gets no more work.
SILENCE_S = 3.0
# One that is announced and says nothing to a new connection is connected to anew after this.
_CONNECT_AGAIN_S = 10.0
_WATCH_EVERY_S = 0.25
_DIRECTORY_EVERY_S = 1.0


class Directory(Protocol):
    """Where replicas announce themselves."""

    async def replicas(self) -> Sequence[Replica]:
        """Everyone announced now; raises OSError while the directory cannot be reached."""
        ...


class Keeper(Protocol):
    """Whose roster it is."""

    def make(self, replica: Replica) -> Member:
        """A connected member; raises `KVError` for a replica that no plan could price."""
        ...

    def lost(self, member: Member) -> None:
        """It fell silent or left; a new connection is made if it is still announced."""
        ...

    def gone(self, member: Member) -> None:
        """It left, with all that it held; `lost` was called before."""
        ...


class Roster:
    """The replicas by name, kept true while `watch` runs."""

    def __init__(self, directory: Directory, keeper: Keeper, now: Callable[[], float]) -> None:
        self._directory, self._keeper, self._now = directory, keeper, now
        self._members: dict[str, Member] = {}
        self._looked_at = now()

    @property
    def by_name(self) -> Mapping[str, Member]:
        """All that are known, up or not; follows every change."""
        return self._members

    async def watch(self) -> None:
        """Until cancelled: follow the directory, notice silence."""
        self._looked_at = self._now()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_directory())
            while True:
                self._notice_silence()
                await asyncio.sleep(_WATCH_EVERY_S)

    def close(self) -> None:
        """Leave every replica; they abort what they ran for us."""
        for member in self._members.values():
            member.close()
        self._members.clear()

    def members(self) -> tuple[Member, ...]:
        """All that are known, up or not, by name."""
        return tuple(sorted(self._members.values(), key=lambda member: member.name))

    def member(self, name: str) -> Member | None:
        """The replica of this name, if it is up."""
        member = self._members.get(name)
        return member if member is not None and member.up else None

    def up(self, role: Role) -> tuple[Member, ...]:
        """All replicas of a pool that answer, by name."""
        return tuple(m for m in self.members() if m.up and m.replica.role is role)

    async def _watch_directory(self) -> None:
        while True:
            try:
                self._follow(await self._directory.replicas())
            except OSError as error:
                # Links go on by themselves; only comings and goings wait for the directory.
                logger.warning("directory not reached: %s", error)
            await asyncio.sleep(_DIRECTORY_EVERY_S)

    def _follow(self, replicas: Sequence[Replica]) -> None:
        announced = {replica.epoch: replica for replica in replicas}
        names = {replica.name for replica in replicas}
        for member in self.members():
            # One that still answers stays: the directory may lag, but its name may be reclaimed.
            gone = member.replica.epoch not in announced
            silent = self._now() - member.heard_at > SILENCE_S
            if gone and (silent or not member.up or member.name in names):
                self._drop(member)
        known = {member.replica.epoch for member in self._members.values()}
        for replica in announced.values():
            if replica.epoch not in known and replica.wire_version == WIRE_VERSION:
                self._adopt(self._named_apart(replica))

    def _named_apart(self, replica: Replica) -> Replica:
        """Two engines carry one name while the older one is stopping; the newer is renamed."""
        if replica.name not in self._members:
            return replica
        return msgspec.structs.replace(replica, name=f"{replica.name}.{replica.epoch[:4]}")

    def _adopt(self, replica: Replica, load: Load | None = None) -> None:
        try:
            member = self._keeper.make(replica)
        except KVError as error:  # it measured nothing: no plan could price it
            logger.warning("%s is not routable: %s", replica.name, error)
            return
        if load is not None:
            member.load = load
        self._members[replica.name] = member

    def _drop(self, member: Member) -> None:
        logger.info("%s left", member.name)
        del self._members[member.name]
        member.close()
        self._keeper.lost(member)
        self._keeper.gone(member)

    def _notice_silence(self) -> None:
        self._forgive(self._now() - self._looked_at - _WATCH_EVERY_S)
        self._looked_at = self._now()
        for member in list(self._members.values()):
            silent_s = self._now() - member.heard_at
            if silent_s > (SILENCE_S if member.up else _CONNECT_AGAIN_S):
                logger.warning("%s silent for %.1f s", member.name, silent_s)
                member.lose(f"silent for {silent_s:.1f} s")
                self._reconnect(member)

    def _forgive(self, late_s: float) -> None:
        """While this process itself stood still it could hear nobody: what they said lies in
        their queues."""
        if late_s > _WATCH_EVERY_S:
            logger.warning("stood still for %.1f s", late_s)
            for member in self._members.values():
                member.heard_at = min(member.heard_at + late_s, self._now())

    def _reconnect(self, member: Member) -> None:
        # A replica that only hung welcomes nobody twice; a new connection is welcomed, and what
        # the old one left running there is aborted when the replica misses it.
        member.close()
        self._keeper.lost(member)
        # What it counted stays known, so that the cluster's sums never fall.
        self._adopt(member.replica, Load(totals=member.load.totals, lanes=member.load.lanes))
