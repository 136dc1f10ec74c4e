"""Each request that was served moves the curves that it was planned by.

An ingress learns from its own requests; several may do so beside each other. It learns a moment
after a first token has left, and what has changed is in the rows that plans are made from before
the next request comes: no decision waits for it.
"""

import asyncio
from collections.abc import Callable

from kv.plan import Plan
from router.audit import Record
from router.member import Member
from router.pools import Pair, Pools
from router.roster import Roster
from router.samples import handoff_of, link_sample, prefill_sample
from router.speed import Speeds
from router.warm import Pairs
from workers.messages import Sources, Spent

# By then a first token has been passed on.
_AFTER_S = 0.01


class Refit:
    """Of one ingress, over those that its roster knows."""

    def __init__(
        self,
        roster: Roster,
        speeds: Speeds,
        pairs: Pairs,
        pools: Pools,
        now: Callable[[], float],
    ) -> None:
        self._roster, self._now = roster, now
        self._speeds, self._pairs, self._pools = speeds, pairs, pools
        self._slow: set[str] = set()

    def soon(self, plan: Plan, record: Record) -> None:
        """Learn from a request whose first token is there, once that has been passed on."""
        asyncio.get_running_loop().call_later(_AFTER_S, self.learn, plan, record)

    def learn(self, plan: Plan, record: Record) -> None:
        """What whoever computed took to compute, and what the handoff took, if there was one."""
        decode = self._roster.member(plan.decode)
        if plan.prefill is None:
            self.computed(decode, record.decode_sources, record.decode_spent)
            return
        self.computed(
            self._roster.member(plan.prefill), record.prefill_sources, record.prefill_spent
        )
        pair = handoff_of(plan)
        if pair is not None and decode is not None and record.decode_spent is not None:
            self.handed_off(pair, decode, record.decode_spent)

    def fade(self) -> None:
        """Bring what changes with time alone up to date (`kv.live`)."""
        for name in list(self._slow):
            self._slow.discard(name)
            if (member := self._roster.member(name)) is not None:
                self._tell(member)
        for pair in self._pairs.fading():
            self._tell_link(pair)

    def computed(self, member: Member | None, sources: Sources | None, spent: Spent | None) -> None:
        """Learn from a prompt that a replica computed; nothing, if it does not say how."""
        if member is None or sources is None or spent is None:
            return
        sample = prefill_sample(sources, spent)
        if sample is not None:
            alike = self._speeds.saw(member.replica, sample, self._now())
            for each in self._roster.members() if alike else (member,):
                self._tell(each)

    def handed_off(self, pair: Pair, decode: Member, spent: Spent) -> None:
        """Learn from a handoff that a decode replica took."""
        link = self._pairs.links.get(pair)
        sample = None if link is None else link_sample(spent, link, decode.speed.curve)
        if sample is not None:
            self._pairs.saw(pair, sample, self._now())
            self._tell_link(pair)

    def _tell(self, member: Member) -> None:
        speed = self._speeds.of(member.replica, self._now())
        live = self._speeds.live(member.replica)
        if live is not None and live.fades:
            self._slow.add(member.name)
        if speed != member.speed:
            member.speed = speed
            self._pools.touch(member)

    def _tell_link(self, pair: Pair) -> None:
        before = self._pairs.links
        if self._pairs.told(pair, self._now()):
            self._pools.relink(pair, before, self._pairs.links)
