"""Every replica that this ingress knows: who may get work, what it has, what it was sent."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from kv.block import pack_tokens
from kv.live import RETRY_S
from router.catalogue.holdings import Expectations, deepest
from router.catalogue.wire import Expect, Found, Line
from router.curve_book import Book
from router.member import Member
from router.pools import Pools
from router.refit import Refit
from router.roster import Directory, Roster
from router.snapshot import Snapshot
from router.speed import Speeds
from router.warm import Pairs
from workers.messages import Blocks, Link, Replica, Role, Submit, Totals

_NOTHING_KEPT = Book()
_WARM_EVERY_S = 0.25
_LOOK_EVERY_S = 0.05


class Fleet:
    """The replicas, the warmed pairs between them, and the line to the catalogue."""

    def __init__(
        self,
        directory: Directory,
        connect: Callable[[Replica, Member], Link],
        line: Line,
        warm_body: bytes,
        now: Callable[[], float],
        rng: random.Random,
        expects_prefill: bool,
        book: Book = _NOTHING_KEPT,
        retry_s: float | None = RETRY_S,
    ) -> None:
        self._connect, self.line, self._random = connect, line, rng
        self.now = self._now = now
        self._expects_prefill, self._body = expects_prefill, warm_body
        self.roster = Roster(directory, self, now)
        self.pairs = Pairs(warm_body, rng, book.links, retry_s)
        # Totals of replicas that left, by their lanes.
        self.retired: dict[tuple[str, ...], Totals] = {}
        self._expected = Expectations()
        self._pools = Pools(self.roster.by_name, self._expected.taken)
        self.speeds = Speeds(book.prefill, retry_s)
        self.refit = Refit(self.roster, self.speeds, self.pairs, self._pools, now)
        self._named = 0
        self._seen_pair = self._seen_catalogue = False

    async def watch(self) -> None:
        """Until cancelled: follow who is there, and warm pairs."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.roster.watch())
            while True:
                self.pairs.warm(self.up(Role.PREFILL), self.up(Role.DECODE), tasks)
                self.refit.fade()
                await asyncio.sleep(_WARM_EVERY_S)

    def close(self) -> None:
        """Leave every replica; they abort what they ran for us."""
        self.roster.close()

    # ------------------------------------------------------------------ what the pipeline asks

    def member(self, name: str) -> Member | None:
        """The replica of this name, if it is up."""
        return self.roster.member(name)

    def members(self) -> tuple[Member, ...]:
        """All that are known, up or not, by name."""
        return self.roster.members()

    def up(self, role: Role) -> tuple[Member, ...]:
        """All replicas of a pool that answer, by name."""
        return self.roster.up(role)

    async def anybody(self, role: Role, within_s: float) -> bool:
        """Whether a replica of a pool answers, now or soon."""
        until = self._now() + within_s
        while not self.up(role) and self._now() < until:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)
        return bool(self.up(role))

    def cached_blocks(self, member: Member) -> int:
        """Blocks that a replica's paged KV holds, by the catalogue's last beat."""
        return self.line.beat.blocks.get(member.replica.epoch, 0)

    def book(self) -> Book:
        """What requests have told of curves, for the next cluster."""
        members, now = self.members(), self._now()
        replicas = (member.replica for member in members)
        return Book(
            prefill=self.speeds.worth_keeping(replicas, now),
            links=self.pairs.worth_keeping({member.name: member for member in members}, now),
        )

    def block_tokens(self) -> int:
        """Tokens a block; the same on every replica of a cluster, 1 while there is none."""
        return next((m.replica.block_tokens for m in self.members()), 1)

    def ready(self) -> bool:
        """Whether one working path exists: a decode replica, and if none has been there since
        the start, a catalogue, and a warmed pair where prefill replicas were asked for."""
        decode = bool(self.up(Role.DECODE))
        self._seen_pair = self._seen_pair or bool(self.pairs.links)
        self._seen_catalogue = self._seen_catalogue or self.line.up
        paired = self._seen_pair or not self._expects_prefill
        return decode and paired and self._seen_catalogue

    @property
    def expected(self) -> int:
        """Requests that were sent and not answered yet."""
        return len(self._expected)

    async def look(self, keys: Sequence[bytes]) -> Found | None:
        """What the catalogue knows of these blocks; None while it cannot be asked."""
        return await self.line.look(b"".join(keys))

    def snapshot(self, keys: Sequence[bytes], found: Found | None, lossy: bool = False) -> Snapshot:
        """What is routable now, with the depth to which each replica holds `keys`, or will, for a
        request that does, or does not, allow a lossy codec."""
        expected = self._expected.depths(keys)
        if found is not None and expected:
            found = msgspec.structs.replace(found, depths=deepest(found.depths, expected))
        return self._pools.snapshot(found, self.pairs.links, lossy, self.line.beat)

    @contextmanager
    def expecting(
        self, replica: str, prefill_tokens: int = 0, keys: Sequence[bytes] = ()
    ) -> Iterator[None]:
        """Count a request as sent to a replica: it is about to compute `prefill_tokens` and to
        have `keys`. Every ingress plans by that, until the block ends."""
        member = self.member(replica)
        if member is None:
            yield
            return
        self._named += 1
        epoch, joined = member.replica.epoch, b"".join(keys)
        expect = Expect(str(self._named), epoch, prefill_tokens, joined)
        self._expected.add(expect)
        self._pools.touch(member)
        self.line.expect(expect)
        try:
            yield
        finally:
            self._expected.remove(expect.name)
            self._pools.touch(member)
            self.line.met(expect.name)

    # ------------------------------------------------------------------ the roster's keeper

    def make(self, replica: Replica) -> Member:
        """A member that is up once it has answered a probe."""
        self.speeds.learn(replica)
        for member in self.roster.members():
            member.speed = self.speeds.of(member.replica, self._now())
            self._pools.touch(member)
        return Member(
            replica,
            connect=lambda member: self._connect(replica, member),
            speed=self.speeds.of(replica, self._now()),
            on_blocks=_no_blocks,
            now=self._now,
            probe=self._probe,
            on_change=self._pools.touch,
        )

    def lost(self, member: Member) -> None:
        """Its NIXL state is void."""
        self.pairs.cool(member.name)

    def gone(self, member: Member) -> None:
        """Its counts stay: sums of counters must not fall."""
        self.speeds.forget(member.replica)
        self._pools.touch(member)
        lanes, totals = member.load.lanes, member.load.totals
        self.retired[lanes] = self.retired.get(lanes, Totals()).plus(totals)

    def _probe(self) -> Submit:
        """A request for one token, which shows that an engine steps."""
        name = f"probe.{self._random.getrandbits(64):016x}"
        return Submit(name, Role.DECODE, pack_tokens([1, 1]), self._body)


def _no_blocks(_: Member, __: Blocks) -> None:
    """Blocks are the catalogue's business; an ingress does not ask for them."""
