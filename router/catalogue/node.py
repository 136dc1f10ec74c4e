"""What a catalogue process follows: every replica's blocks."""

import asyncio
import os
import time
from collections.abc import Callable

from router.catalogue import wire
from router.catalogue.holdings import Holdings
from router.member import Member
from router.roster import Directory, Roster
from workers.messages import Blocks, Inbox, Link, Replica

_SWEEP_EVERY_S = 0.25
_SWEEP_SHARDS = 4
_LAG_WINDOW_S = 15.0

# (a replica, where its replies go) to a link that follows its blocks.
Connect = Callable[[Replica, Inbox], Link]


class CatalogueNode:
    """Keeps `holdings` true while `watch` runs."""

    def __init__(self, directory: Directory, connect: Connect, now: Callable[[], float]) -> None:
        self._connect, self._now = connect, now
        self.holdings = Holdings()
        self.roster = Roster(directory, self, now)
        # Of this window and the one before, so that no reader misses the worst.
        self._lags_s, self._window_at = (0.0, 0.0), now()

    async def watch(self) -> None:
        """Until cancelled: follow who is there, and sweep what was forgotten."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.roster.watch())
                while True:
                    await asyncio.sleep(_SWEEP_EVERY_S)
                    self.holdings.sweep(_SWEEP_SHARDS)
        finally:
            self.roster.close()

    def make(self, replica: Replica) -> Member:
        """A member of which only the blocks matter: no probe, no requests."""
        return Member(
            replica,
            connect=lambda member: self._connect(replica, member),
            on_blocks=self._follow,
            now=self._now,
        )

    def lost(self, member: Member) -> None:
        """Its blocks stay: no ingress routes there, and if it comes back a snapshot follows."""

    def gone(self, member: Member) -> None:
        """Its engine is no more, and neither are its blocks."""
        self.holdings.forget(member.replica.epoch)

    def _follow(self, member: Member, blocks: Blocks) -> None:
        self.holdings.follow(member.replica.epoch, blocks)
        if blocks.at_s and not blocks.snapshot:
            before_s, worst_s = self._lags_s
            self._lags_s = before_s, max(worst_s, time.time() - blocks.at_s)

    def beat(self) -> wire.Beat:
        """What to tell ingresses now."""
        if self._now() - self._window_at > _LAG_WINDOW_S:
            self._lags_s, self._window_at = (self._lags_s[1], 0.0), self._now()
        epochs = [member.replica.epoch for member in self.roster.members()]
        blocks = {epoch: self.holdings.blocks(epoch) for epoch in epochs}
        return wire.Beat(os.getpid(), blocks, max(self._lags_s), self.holdings.regret)
