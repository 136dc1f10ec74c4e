"""Every replica that this ingress knows: who may get work, what it has, what it was sent."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from kv.block import pack_tokens
from kv.catalogue import Tier
from kv.live import RETRY_S
from kv.parts import Action
from kv.plan import Plan
from router.catalogue.holdings import Expectations, deepest
from router.catalogue.wire import Expect, Found, Line
from router.curve_book import Book
from router.member import Member
from router.pools import Pools
from router.refit import Refit
from router.retired import Counts, Retired
from router.roster import Directory, Roster
from router.snapshot import Snapshot
from router.speed import Speeds
from router.tier_curves import peer_of, worth_keeping
from router.warm import Pairs
from workers.messages import Blocks, FetchLoad, Link, Load, Replica, Role, Submit, TierLoad

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
        self._retired = Retired()
        self._expected = Expectations()
        # What is known of tiers by those that left, and by earlier clusters.
        self._tiers_kept = dict(book.tiers)
        self._pools = Pools(self.roster.by_name, self._expected.taken, book.tiers)
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

    def retired(self) -> Sequence[Counts]:
        """Lanes and totals of replicas that left."""
        return self._retired.all()

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
            tiers=worth_keeping(members),
        )

    def tiers_of(self, member: Member) -> Mapping[Tier, TierLoad]:
        """What it told of its tiers, at the costs that plans go by."""
        return self._pools.tiers_of(member)

    def peer_of(self, member: Member) -> FetchLoad:
        """What plans take blocks to cost it that another replica lends."""
        return peer_of(member.replica, member.load.peer, self._pools.kept)

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

    @contextmanager
    def fetching(self, replica: str, plan: Plan) -> Iterator[None]:
        """Count what a plan has a replica fetch as under way, for as long as that is predicted to
        take and until the block ends at most: what it fetches from there next comes behind that.
        Other ingresses know nothing of it."""
        member = self.member(replica)
        if member is None or not (under_way := _fetched(replica, plan, member.replica)):
            yield
            return
        member.fetching += under_way
        self._pools.touch(member)

        def ended() -> None:
            member.fetching -= under_way
            under_way.clear()
            self._pools.touch(member)

        # What it computes behind them does not keep the tier busy.
        fetches = (part for part in plan.parts if part.action is Action.FETCH)
        end_s = max((part.end_s for part in fetches if part.replica == replica), default=None)
        timer = None if end_s is None else asyncio.get_running_loop().call_later(end_s, ended)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            ended()

    # ------------------------------------------------------------------ the roster's keeper

    def make(self, replica: Replica) -> Member:
        """A member that is up once it has answered a probe."""
        self.speeds.learn(replica)
        # It knows nothing of its tiers yet, and begins with what those like it know by now.
        self._tiers_kept |= worth_keeping(self.roster.members())
        self._pools.kept = dict(self._tiers_kept)
        for member in self.roster.members():
            member.speed = self.speeds.of(member.replica, self._now())
            self._pools.touch(member)
        member = Member(
            replica,
            connect=lambda member: self._connect(replica, member),
            speed=self.speeds.of(replica, self._now()),
            on_blocks=_no_blocks,
            now=self._now,
            probe=self._probe,
            on_change=self._pools.touch,
        )
        if (left := self._retired.back(replica.epoch)) is not None:
            member.load = Load(lanes=left.lanes, totals=left.totals)
        return member

    def lost(self, member: Member) -> None:
        """Its NIXL state is void."""
        self.pairs.cool(member.name)

    def gone(self, member: Member) -> None:
        """Its counts stay: sums of counters must not fall."""
        self.speeds.forget(member.replica)
        self._tiers_kept |= worth_keeping([member])
        self._pools.touch(member)
        self._retired.left(member.replica.epoch, Counts(member.load.lanes, member.load.totals))

    def _probe(self) -> Submit:
        """A request for one token, which shows that an engine steps."""
        name = f"probe.{self._random.getrandbits(64):016x}"
        return Submit(name, Role.DECODE, pack_tokens([1, 1]), self._body)


def _fetched(name: str, plan: Plan, replica: Replica) -> Counter[Tier]:
    """Bytes that a plan has it fetch, by tier."""
    spans = (span for span in plan.spans if span.replica == name)
    token_bytes = replica.kv_bytes_per_token
    return Counter({span.tier: span.tokens * token_bytes for span in spans if span.tier})


def _no_blocks(_: Member, __: Blocks) -> None:
    """Blocks are the catalogue's business; an ingress does not ask for them."""
