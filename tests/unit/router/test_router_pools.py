import math
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.refit import SHIFT_AFTER
from router.catalogue.wire import Beat, Found, Taken
from router.columns import Columns, Floats
from router.curve_book import KeptLink
from router.member import Member
from router.pools import NOTHING, Pools, view_of
from router.snapshot import ReplicaView, Snapshot, TierView
from workers.messages import FetchLoad, Load, LossyLoad, Request, Role, TierLoad, Welcome
from workers.sim import SimCosts, sim_replica

some_name = st.sampled_from(["a", "b", "c", "d"])
some_role = st.sampled_from(Role)


# Of one kind of hardware, and less than anybody tells.
KEPT_VAULT, KEPT_PEER = LinkCurve(0.002, 2e-10), LinkCurve(0.003, 3e-10)
KEPT = {
    "cpu, vault": KeptLink(KEPT_VAULT.latency_s, KEPT_VAULT.per_byte_s, 9),
    "cpu, peer": KeptLink(KEPT_PEER.latency_s, KEPT_PEER.per_byte_s, 9),
}
some_behind = st.sampled_from([Tier.HOST, Tier.DISK, Tier.VAULT])


def with_hits(
    row: ReplicaView, hit_tokens: int, behind: Mapping[Tier, int], block_tokens: int
) -> ReplicaView:
    tiers = tuple(
        replace(view, hit_tokens=behind.get(view.tier, 0) * block_tokens) for view in row.tiers
    )
    return replace(row, hit_tokens=hit_tokens, tiers=tiers)


def as_kept(view: TierView) -> TierView:
    return replace(view, curve=KEPT_VAULT) if view.tier is Tier.VAULT else view


class Nowhere:
    """A link to a replica that never answers."""

    def send(self, request: Request) -> None: ...

    def close(self) -> None: ...


def fetches(member: Member, of_lossy: bool = False) -> int:
    told = member.load.tiers.get(Tier.VAULT)
    counted = told.lossy if told is not None and of_lossy else told
    return 0 if counted is None else counted.samples


def vault_of(member: Member) -> TierView:
    """As it tells of it."""
    views = view_of(member, NOTHING).tiers
    return next(view for view in views if view.tier is Tier.VAULT)


class PoolsAgainstMembers(RuleBasedStateMachine):
    """Whatever happens to members, a snapshot shows what making it anew would show."""

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, Member] = {}
        self.sent: dict[str, Taken] = {}
        self.pools = Pools(self.members, lambda epoch: self.sent.get(epoch, NOTHING), KEPT)
        self.links: dict[tuple[str, str], LinkCurve] = {}
        self.shown: list[tuple[Snapshot, list[object], Floats]] = []
        # Of exact blocks, and of lossy ones.
        self.fetched: tuple[list[Member], list[Member]] = ([], [])

    @rule(
        name=some_name,
        role=some_role,
        up=st.booleans(),
        lends=st.booleans(),
        hardware=st.sampled_from(["", "cpu", "gpu"]),
    )
    def come(self, name: str, role: Role, up: bool, lends: bool, hardware: str) -> None:
        epoch = f"{name}/{len(self.shown)}"
        replica = sim_replica(name, role, SimCosts(), epoch=epoch, hardware=hardware)
        if lends:
            replica = msgspec.structs.replace(replica, peer_address=f"tcp://{replica.epoch}")
        member = Member(
            replica,
            lambda _: Nowhere(),
            lambda member, blocks: None,
            lambda: 0.0,
            on_change=self.pools.touch,
        )
        self.members[name] = member
        self.pools.touch(member)
        if up:
            member.receive(Welcome(replica))

    @rule(name=some_name)
    def go(self, name: str) -> None:
        if member := self.members.pop(name, None):
            self.pools.touch(member)

    @rule(name=some_name)
    def hang(self, name: str) -> None:
        if member := self.members.get(name):
            member.lose("silent")

    @rule(
        name=some_name,
        waiting=st.integers(0, 3),
        draining=st.booleans(),
        tiers=st.sets(some_behind),
        unnamed=st.integers(0, 1),
        samples=st.integers(0, 9),
        lossy=st.none() | st.integers(0, 9),
        borrowed=st.none() | st.integers(1, 9),
    )
    def report(
        self,
        name: str,
        waiting: int,
        draining: bool,
        tiers: set[Tier],
        unnamed: int,
        samples: int,
        lossy: int | None,
        borrowed: int | None,
    ) -> None:
        if member := self.members.get(name):
            # No two replicas know the same.
            latency_s = 0.01 + ord(name) / 1000 + samples / 100
            rounded = None if lossy is None else LossyLoad(latency_s / 2, 1e-9, lossy)
            told = {tier: TierLoad(9, unnamed, latency_s, 1e-9, samples, rounded) for tier in tiers}
            before = fetches(member), fetches(member, of_lossy=True)
            peer = None if borrowed is None else FetchLoad(latency_s, 3e-9, borrowed)
            member.receive(Load(waiting=waiting, draining=draining, tiers=told, peer=peer))
            for of_lossy in (False, True):
                if fetches(member, of_lossy) != before[of_lossy]:
                    self.fetched[of_lossy].append(member)

    @rule(name=some_name, requests=st.integers(0, 3), tokens=st.integers(0, 9000))
    def send(self, name: str, requests: int, tokens: int) -> None:
        if member := self.members.get(name):
            self.sent[member.replica.epoch] = Taken(requests, requests, requests * tokens)
            self.pools.touch(member)

    @rule(p=some_name, d=some_name, latency_s=st.sampled_from([0.01, 0.02]))
    def warm(self, p: str, d: str, latency_s: float) -> None:
        self.links = {**self.links, (p, d): LinkCurve(latency_s, 1e-9)}

    @rule(p=some_name, d=some_name, latency_s=st.sampled_from([0.03, 0.04]))
    def relink(self, p: str, d: str, latency_s: float) -> None:
        if (p, d) in self.links:
            before = self.links
            self.links = {**before, (p, d): LinkCurve(latency_s, 2e-9)}
            self.pools.relink((p, d), before, self.links)

    @rule(name=some_name)
    def cool(self, name: str) -> None:
        self.links = {pair: link for pair, link in self.links.items() if name not in pair}

    @rule(
        depths=st.dictionaries(some_name, st.integers(1, 5)),
        others=st.dictionaries(some_name, st.integers(1, 3)),
        behind=st.dictionaries(
            some_name, st.dictionaries(some_behind, st.integers(1, 9), min_size=1)
        ),
        lossy=st.booleans(),
    )
    def snapshot(
        self,
        depths: dict[str, int],
        others: dict[str, int],
        behind: dict[str, dict[Tier, int]],
        lossy: bool,
    ) -> None:
        epochs = {name: member.replica.epoch for name, member in self.members.items()}
        held = {epochs[name]: depth for name, depth in depths.items() if name in epochs}
        taken = {epochs[name]: Taken(n, n, 100 * n) for name, n in others.items() if name in epochs}
        further = {epochs[name]: found for name, found in behind.items() if name in epochs}
        # What anybody told of the vault is there for all who have one.
        vault = max((found.get(Tier.VAULT, 0) for found in further.values()), default=0)
        snapshot = self.pools.snapshot(Found(held, taken, further), self.links, lossy)
        for role, pool in ((Role.PREFILL, snapshot.prefill), (Role.DECODE, snapshot.decode)):
            routable = [
                with_hits(
                    self.told(
                        m,
                        view_of(
                            m,
                            self.sent.get(m.replica.epoch, NOTHING),
                            taken.get(m.replica.epoch, NOTHING),
                        ),
                        lossy,
                    ),
                    held.get(m.replica.epoch, 0) * m.replica.block_tokens,
                    {**further.get(m.replica.epoch, {}), Tier.VAULT: vault},
                    m.replica.block_tokens,
                )
                for m in self.routable(role)
            ]
            assert list(pool) == routable
            assert list(pool[:1]) == routable[:1]
        shown = [*self.routable(Role.DECODE), *self.routable(Role.PREFILL)]
        addresses = {m.name: m.replica.peer_address for m in shown if m.replica.peer_address}
        assert dict(snapshot.peers) == addresses
        self.columns_are_those_of_the_rows(snapshot)
        self.prices_are_those_of_the_links(snapshot)
        assert snapshot.columns is not None
        links = snapshot.columns.links.latency_s.copy()
        self.shown.append((snapshot, [*snapshot.prefill, *snapshot.decode], links))

    def columns_are_those_of_the_rows(self, snapshot: Snapshot) -> None:
        """Kept from request to request or made anew, they are the same numbers."""
        anew = Columns.of(snapshot.decode, snapshot.prefill, snapshot.links)
        kept = snapshot.columns
        assert kept is not None
        assert (kept.names, kept.n_decode) == (anew.names, anew.n_decode)
        assert np.array_equal(kept.loads, anew.loads)
        assert np.array_equal(kept.hit_tokens, anew.hit_tokens)
        assert (kept.tiers is None) is (anew.tiers is None)
        if kept.tiers is not None and anew.tiers is not None:
            assert kept.tiers.order == anew.tiers.order
            assert all(map(np.array_equal, kept.tiers[1:], anew.tiers[1:]))

    def told(self, member: Member, row: ReplicaView, lossy: bool) -> ReplicaView:
        """All go by whoever beside them fetched from the vault last, and by who last fetched what a
        lossy codec stored; where that was seldom, by what is kept of their hardware; and who allows
        a lossy codec by what that costs."""
        last, last_lossy = self.last_to_fetch(False), self.last_to_fetch(True)
        if Tier.VAULT in member.load.tiers:
            own = {view.tier: view for view in row.tiers}
            shown = own[Tier.VAULT]
            if last is not None:
                its = vault_of(last)
                shown = replace(its, lossy=shown.lossy or its.lossy)
            if last_lossy is not None:
                shown = replace(shown, lossy=vault_of(last_lossy).lossy)
            row = replace(row, tiers=tuple((own | {Tier.VAULT: shown}).values()))
        peer = member.load.peer
        if peer is not None:
            row = replace(row, peer=LinkCurve(peer.latency_s, peer.per_byte_s))
        if member.replica.hardware == "cpu":
            if fetches(last or member) < SHIFT_AFTER:
                row = replace(row, tiers=tuple(map(as_kept, row.tiers)))
            if peer is None or peer.samples < SHIFT_AFTER:
                row = replace(row, peer=KEPT_PEER)
        behind = row.tiers
        if lossy:
            behind = tuple(
                replace(view, curve=view.lossy) if view.lossy is not None else view
                for view in behind
            )
        return replace(row, tiers=behind)

    def last_to_fetch(self, of_lossy: bool) -> Member | None:
        shown = [*self.routable(Role.DECODE), *self.routable(Role.PREFILL)]
        of_late = reversed(self.fetched[of_lossy])
        return next((m for m in of_late if m in shown and fetches(m, of_lossy)), None)

    def routable(self, role: Role) -> list[Member]:
        """Who finishes up gets work only where nobody else could give tokens."""
        up = [m for _, m in sorted(self.members.items()) if m.up and m.replica.role is role]
        staying = [m for m in up if not m.load.draining]
        return staying or (up if role is Role.DECODE else [])

    def prices_are_those_of_the_links(self, snapshot: Snapshot) -> None:
        assert snapshot.columns is not None
        for i, decode in enumerate(snapshot.decode):
            for j, prefill in enumerate(snapshot.prefill):
                link = self.links.get((prefill.name, decode.name))
                columns = snapshot.columns.links
                assert columns.latency_s[i, j] == (link.latency_s if link else math.inf)
                assert columns.per_byte_s[i, j] == (link.per_byte_s if link else 0.0)

    @invariant()
    def a_snapshot_never_changes(self) -> None:
        for snapshot, rows, links in self.shown:
            assert [*snapshot.prefill, *snapshot.decode] == rows
            assert snapshot.columns is not None
            assert np.array_equal(snapshot.columns.links.latency_s, links)


TestPoolsAgainstMembers = PoolsAgainstMembers.TestCase
TestPoolsAgainstMembers.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_only_what_changed_is_made_anew() -> None:
    """A load makes one row new; the rows of the others are the same objects."""
    members: dict[str, Member] = {}
    pools = Pools(members, lambda epoch: NOTHING)
    for name in "ab":
        replica = sim_replica(name, Role.DECODE, SimCosts())
        members[name] = Member(
            replica, lambda _: Nowhere(), lambda m, b: None, lambda: 0.0, on_change=pools.touch
        )
        members[name].receive(Welcome(replica))
    links: dict[tuple[str, str], LinkCurve] = {}
    first = pools.snapshot(Found(), links)
    members["b"].receive(Load(running=3))
    second = pools.snapshot(Found(), links)
    assert second.decode._rows[0] is first.decode._rows[0]
    assert second.decode[1].running == 3
    assert first.columns is not None
    assert second.columns is not None
    assert second.columns.links is first.columns.links


def test_room_and_regret_are_the_catalogues_last_word() -> None:
    """What a full replica displaces is in the columns from the beat that tells so, and gone with
    the beat that no longer does."""
    members: dict[str, Member] = {}
    pools = Pools(members, lambda epoch: NOTHING)
    for name in "ab":
        replica = sim_replica(name, Role.DECODE, SimCosts())
        members[name] = Member(
            replica, lambda _: Nowhere(), lambda m, b: None, lambda: 0.0, on_change=pools.touch
        )
        members[name].receive(Welcome(replica))
    a, b = (members[name].replica for name in "ab")
    beat = Beat(1, {a.epoch: a.kv_blocks, b.epoch: 10}, regret=0.5)
    columns = pools.snapshot(Found(), {}, beat=beat).columns
    assert columns is not None
    assert columns.displaced is not None
    assert columns.displaced.free_tokens.tolist() == [0.0, (b.kv_blocks - 10) * b.block_tokens]
    per_token_s = members["a"].speed.curve.per_token_s
    assert columns.displaced.per_token_s.tolist() == pytest.approx([0.5 * per_token_s] * 2)
    again = pools.snapshot(Found(), {}, beat=beat).columns
    assert again is not None
    assert again.displaced is columns.displaced
    quiet = pools.snapshot(Found(), {}, beat=Beat(1, beat.blocks)).columns
    assert quiet is not None
    assert quiet.displaced is None
