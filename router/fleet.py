"""Every replica that this ingress knows, kept true: who is there, who answers, who holds what."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec

from kv.block import split_keys
from kv.catalogue import Catalogue, Delta, Holder, Tier
from kv.errors import KVError
from router.member import Member
from router.snapshot import ReplicaView, Snapshot
from router.warm import Pairs
from workers.messages import WIRE_VERSION, Blocks, Link, Load, Replica, Role, Totals

logger = logging.getLogger(__name__)

# A replica beats at least once a second; this long without a word and it gets no more work.
SILENCE_S = 3.0
_WATCH_EVERY_S = 0.25
_DIRECTORY_EVERY_S = 1.0
_SWEEP_SHARDS = 16


class Directory(Protocol):
    """Where replicas announce themselves."""

    async def replicas(self) -> Sequence[Replica]:
        """Everyone announced now; raises OSError while the directory cannot be reached."""
        ...


class Fleet:
    """The replicas, their blocks and the warmed pairs between them."""

    def __init__(
        self,
        directory: Directory,
        connect: Callable[[Replica, Member], Link],
        warm_body: bytes,
        now: Callable[[], float],
        rng: random.Random,
        expects_prefill: bool,
    ) -> None:
        self._directory, self._connect, self._now = directory, connect, now
        self._expects_prefill = expects_prefill
        self._members: dict[str, Member] = {}
        self.catalogue = Catalogue()
        # Blocks that requests under way are computing, by who computes them.
        self._expected = Catalogue(shards=1)
        self.pairs = Pairs(warm_body, rng)
        # Totals of replicas that left, by their lanes.
        self.retired: dict[tuple[str, ...], Totals] = {}
        self._seen_pair = False

    async def watch(self) -> None:
        """Until cancelled: follow the directory, notice silence, warm pairs, sweep."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_directory())
            while True:
                self._notice_silence()
                self.pairs.warm(self.up(Role.PREFILL), self.up(Role.DECODE), tasks)
                self.catalogue.sweep(_SWEEP_SHARDS)
                await asyncio.sleep(_WATCH_EVERY_S)

    def close(self) -> None:
        """Leave every replica; they abort what they ran for us."""
        for member in self._members.values():
            member.close()
        self._members.clear()

    # ------------------------------------------------------------------ what the pipeline asks

    def member(self, name: str) -> Member | None:
        """The replica of this name, if it is up."""
        member = self._members.get(name)
        return member if member is not None and member.up else None

    def members(self) -> tuple[Member, ...]:
        """All that are known, up or not, by name."""
        return tuple(sorted(self._members.values(), key=lambda member: member.name))

    def up(self, role: Role) -> tuple[Member, ...]:
        """All replicas of a pool that answer, by name."""
        return tuple(m for m in self.members() if m.up and m.replica.role is role)

    def cached_blocks(self, member: Member) -> int:
        """Blocks that a replica's paged KV holds, by the catalogue."""
        return self.catalogue.blocks(_holder(member))

    def block_tokens(self) -> int:
        """Tokens a block; the same on every replica of a cluster, 1 while there is none."""
        return next((m.replica.block_tokens for m in self._members.values()), 1)

    def ready(self) -> bool:
        """Whether one working path exists: a decode replica, and a warmed pair if prefill
        replicas were asked for and none has been warmed since the start."""
        decode = bool(self.up(Role.DECODE))
        self._seen_pair = self._seen_pair or bool(self.pairs.links)
        return decode and (self._seen_pair or not self._expects_prefill)

    def snapshot(self, keys: Sequence[bytes]) -> Snapshot:
        """What is routable now, with the depth to which each replica holds `keys`."""
        depths = self._depths(keys)
        decode = self.up(Role.DECODE)
        return Snapshot(
            prefill=self._views(Role.PREFILL, depths),
            decode=self._views(Role.DECODE, depths),
            links=self.pairs.links,
            kv_bytes_per_token=decode[0].replica.kv_bytes_per_token if decode else 0,
        )

    @contextmanager
    def expecting(self, replica: str, keys: Sequence[bytes]) -> Iterator[None]:
        """While a replica computes these blocks, plan as if it had them: siblings of a request
        that is under way follow it instead of computing the same prefix elsewhere."""
        holder = Holder(replica, Tier.DEVICE)
        self._expected.add(holder, keys)
        try:
            yield
        finally:
            # A sibling's own expectation may go with this one; that costs a prediction only.
            self._expected.remove(holder, keys)

    def _depths(self, keys: Sequence[bytes]) -> dict[Holder, int]:
        depths = dict(self.catalogue.depths(keys))
        for holder, depth in self._expected.depths(keys).items():
            depths[holder] = max(depth, depths.get(holder, 0))
        return depths

    def _views(self, role: Role, depths: Mapping[Holder, int]) -> tuple[ReplicaView, ...]:
        """What may get work: up, and not finishing up."""
        routable = (member for member in self.up(role) if not member.load.draining)
        return tuple(_view(m, depths.get(_holder(m), 0)) for m in routable)

    # ------------------------------------------------------------------ keeping it true

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
            self._members[replica.name] = Member(
                replica,
                connect=lambda member: self._connect(replica, member),
                on_blocks=self._follow_blocks,
                now=self._now,
            )
        except KVError as error:  # it measured nothing: no plan could price it
            logger.warning("%s is not routable: %s", replica.name, error)
            return
        if load is not None:
            self._members[replica.name].load = load

    def _drop(self, member: Member) -> None:
        logger.info("%s left", member.name)
        del self._members[member.name]
        lanes, totals = member.load.lanes, member.load.totals
        self.retired[lanes] = self.retired.get(lanes, Totals()).plus(totals)
        member.close()
        self.catalogue.forget(_holder(member))
        self.pairs.cool(member.name)

    def _notice_silence(self) -> None:
        for member in list(self._members.values()):
            silent_s = self._now() - member.heard_at
            if member.up and silent_s > SILENCE_S:
                logger.warning("%s silent for %.1f s", member.name, silent_s)
                member.lose(f"silent for {silent_s:.1f} s")
                self._reconnect(member)

    def _reconnect(self, member: Member) -> None:
        # A replica that only hung welcomes nobody twice; a new connection is welcomed, and what
        # the old one left running there is aborted when the replica misses it.
        member.close()
        self.pairs.cool(member.name)
        # What it counted stays known, so that the cluster's sums never fall.
        self._adopt(member.replica, Load(totals=member.load.totals, lanes=member.load.lanes))

    def _follow_blocks(self, member: Member, blocks: Blocks) -> None:
        self.catalogue.apply(
            Delta(
                holder=_holder(member),
                stored=tuple(split_keys(blocks.stored)),
                removed=tuple(split_keys(blocks.removed)),
                cleared=blocks.snapshot,
            )
        )


def _holder(member: Member) -> Holder:
    return Holder(member.name, Tier.DEVICE)


def _view(member: Member, depth: int) -> ReplicaView:
    replica = member.replica
    return ReplicaView(
        name=member.name,
        curve=member.curve,
        step_s=replica.step_s,
        queued_prefills=member.queued_prefills,
        queued_tokens=member.queued_tokens,
        waiting=member.load.waiting,
        running=max(member.load.running, member.requests),
        max_num_seqs=replica.max_num_seqs,
        hit_tokens=depth * replica.block_tokens,
    )
