"""What snapshots show, kept from one request to the next.

A row is made anew when its replica's load changes, which takes 8 us and is not a decision's to pay;
all rows when a replica came, went or drains; the columns of links when a pair was warmed or cooled.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec
import numpy as np

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.fetch import GUESSES
from router.catalogue.wire import Beat, Found, Taken
from router.columns import (
    TIER_AT,
    TIER_ORDER,
    Columns,
    Displaced,
    Floats,
    Lending,
    LinkColumns,
    TierCosts,
    load_of,
    loads_of,
)
from router.member import Member
from router.snapshot import Pool, ReplicaView, Snapshot, TierView, Unnamed
from router.tier_curves import Kept, curve_of, peer_of, tiers_of
from workers.messages import FetchLoad, LossyLoad, Role, TierLoad

NOTHING = Taken()
_NO_BEAT = Beat()
_NOTHING_KEPT: Kept = MappingProxyType({})
Pair = tuple[str, str]


class Pools:
    """Both pools of a fleet, up to date when a snapshot is taken.

    `sent` says what this ingress has sent to the replica of an epoch. `kept` is what was known of
    tiers before; whoever puts another mapping there touches all members.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        sent: Callable[[str], Taken],
        kept: Kept = _NOTHING_KEPT,
    ) -> None:
        self._members, self._sent, self.kept = members, sent, kept
        self._moved = False  # someone came or went: no row is where it should be
        # By name, decode replicas first, as their columns are.
        self._rows: list[ReplicaView] = []
        self._names: tuple[str, ...] = ()
        self._epochs: tuple[str, ...] = ()
        self._places: dict[str, int] = {}
        self._nodes: dict[str, list[Member]] = {}
        # By name, and whether of lossy blocks: how many fetches from the vault it told of, and
        # which of all changes that was.
        self._fetched: dict[tuple[str, bool], tuple[Member, int, int]] = {}
        self._fetches_seen = 0
        self._n_decode = 0
        self._block_tokens, self._kv_bytes_per_token = 1, 0
        self._places_of_epochs: dict[str, int] = {}
        self._loads, self._tier_costs = loads_of(()), TierCosts(0)
        self._lending = Lending.of((), {}, {})
        self._curves: Mapping[tuple[str, str], LinkCurve] | None = None
        self._links = LinkColumns.of((), (), {})
        self._peers: Mapping[str, str] = {}
        self._room_tokens: Mapping[str, int] = {}
        self._beat: Beat | None = None
        self._displaced: Displaced | None = None

    def touch(self, member: Member) -> None:
        """Something that its row is made of has changed, or it came, or it left."""
        name, fetched = member.name, self._has_fetched(member)
        if self._shown(name) is not self._routable(name):
            self._moved = True
        elif name in self._places and not self._moved:
            before = self._rows[self._places[name]].tiers
            self._set(self._members[name])
            if fetched or self._rows[self._places[name]].tiers != before:
                for beside in self._nodes.get(member.replica.node, ()):
                    self._set(beside)

    def relink(
        self, pair: Pair, before: Mapping[Pair, LinkCurve], curves: Mapping[Pair, LinkCurve]
    ) -> None:
        """The link of one pair has changed, and nothing else between these two mappings: its place
        in the columns is set now, which is not a decision's to pay."""
        p, d = (self._places.get(name) for name in pair)
        if self._moved or self._curves is not before or p is None or d is None:
            return
        if not d < self._n_decode <= p:  # names of other roles by now
            return
        self._curves, at = curves, (d, p - self._n_decode)
        self._links = LinkColumns(self._links.latency_s.copy(), self._links.per_byte_s.copy())
        self._links.latency_s[at] = curves[pair].latency_s
        self._links.per_byte_s[at] = curves[pair].per_byte_s

    def snapshot(
        self,
        found: Found | None,
        curves: Mapping[Pair, LinkCurve],
        lossy: bool = False,
        beat: Beat = _NO_BEAT,
    ) -> Snapshot:
        """What is routable now; `found` is what the catalogue and this ingress know of the prompt,
        `beat` what the catalogue said last.

        `curves` are the warmed links, a new mapping whenever one has changed. A `lossy` request
        allows its stored blocks to be.
        """
        if self._moved:
            self._rebuild()
        names, n_decode = self._names, self._n_decode
        if self._curves is not curves:
            self._links = LinkColumns.of(names[:n_decode], names[n_decode:], curves)
            self._curves = curves
        rows, loads = self._with(found.taken if found is not None else {})
        depth_of, block_tokens = (found or Found()).depths.get, self._block_tokens
        hit_tokens = np.array(
            [depth_of(epoch, 0) * block_tokens for epoch in self._epochs], np.float64
        )
        tiers = None
        if found is not None and found.tiers:
            tiers = self._tier_costs.holding(self._held_tokens(found.tiers), lossy)
        beside = tiers, self._displaces(beat), self._lending
        return Snapshot(
            prefill=Pool(rows[n_decode:], hit_tokens[n_decode:], tiers, n_decode, lossy),
            decode=Pool(rows[:n_decode], hit_tokens[:n_decode], tiers, 0, lossy),
            links=curves,
            kv_bytes_per_token=self._kv_bytes_per_token,
            columns=Columns(names, n_decode, loads, self._links, hit_tokens, *beside),
            blind=found is None,
            peers=self._peers,
            room_tokens=self._room_tokens,
            block_tokens=self._block_tokens,
        )

    def _displaces(self, beat: Beat) -> Displaced | None:
        """Made anew with each beat; curves that have changed since can wait for the next."""
        if beat is not self._beat:
            self._beat = beat
            replicas = (self._members[name].replica for name in self._names)
            free_tokens = [
                (replica.kv_blocks - beat.blocks.get(replica.epoch, 0)) * replica.block_tokens
                for replica in replicas
            ]
            told = self._rows, free_tokens, beat.regret, self._kv_bytes_per_token
            self._displaced = Displaced.of(*told)
        return self._displaced

    def _held_tokens(self, tiers: Mapping[str, Mapping[Tier, int]]) -> Floats:
        """Leading tokens by tier and by the place of a replica. A vault is everybody's, whoever
        stored there."""
        tokens = np.zeros((len(TIER_ORDER), len(self._epochs)))
        vault_blocks = 0
        for epoch, depths in tiers.items():
            place = self._places_of_epochs.get(epoch)
            vault_blocks = max(vault_blocks, depths.get(Tier.VAULT, 0))
            if place is not None:
                for tier, depth in depths.items():
                    tokens[TIER_AT[tier], place] = depth
        tokens[TIER_AT[Tier.VAULT]] = vault_blocks
        tokens *= self._block_tokens
        return tokens

    def _with(self, others: Mapping[str, Taken]) -> tuple[list[ReplicaView], Floats]:
        """Rows and loads, with what other ingresses have sent on top."""
        rows, loads = self._rows, self._loads.copy()
        if not others:
            return rows, loads
        rows = rows.copy()
        for place, epoch in enumerate(self._epochs):
            if epoch in others:
                rows[place] = self._row(self._members[self._names[place]], others[epoch])
                loads[:, place] = load_of(rows[place])
        return rows, loads

    def _set(self, member: Member) -> None:
        place = self._places[member.name]
        self._rows[place] = row = self._row(member)
        self._loads[:, place] = load_of(row)
        self._tier_costs.set(place, row.tiers)

    def _row(self, member: Member, others: Taken = NOTHING) -> ReplicaView:
        peer = member.load.peer
        if self.kept:
            peer = peer_of(member.replica, peer, self.kept)
        sent = self._sent(member.replica.epoch)
        return view_of(member, sent, others, self._known_tiers(member), peer)

    def tiers_of(self, member: Member) -> Mapping[Tier, TierLoad]:
        """What it told of its tiers, at the costs that plans go by."""
        if self._moved:
            self._rebuild()
        return self._known_tiers(member)

    def _known_tiers(self, member: Member) -> Mapping[Tier, TierLoad]:
        tiers, node = member.load.tiers, member.replica.node
        if Tier.VAULT in tiers:
            exact, lossy = (self._last_to_fetch(node, of_lossy) for of_lossy in (False, True))
            told = _as_known(tiers[Tier.VAULT], exact, lossy)
            if told is not tiers[Tier.VAULT]:
                tiers = {**tiers, Tier.VAULT: told}
        return tiers_of(member.replica, tiers, self.kept)

    def _has_fetched(self, member: Member) -> bool:
        """Whether it tells of other fetches from the vault than it did before."""
        told = [self._tells(member, of_lossy) for of_lossy in (False, True)]
        return any(told)

    def _tells(self, member: Member, of_lossy: bool) -> bool:
        at = member.name, of_lossy
        last, fetches = self._fetched.get(at), _fetches(member, of_lossy)
        if last is not None and last[0] is member and last[1] == fetches:
            return False
        self._fetches_seen += 1
        self._fetched[at] = member, fetches, self._fetches_seen
        return True

    def _last_to_fetch(self, node: str, of_lossy: bool) -> Member | None:
        """A vault is as far from all replicas of a node, so the last one that used it knows best
        how far that is: were each to go by its own fetches, each would have to find out for itself
        that a link has become slow."""
        there = (member for member in self._nodes.get(node, ()) if _fetches(member, of_lossy))
        order = self._fetched
        return max(there, key=lambda member: order[member.name, of_lossy][2], default=None)

    def _rebuild(self) -> None:
        self._moved, self._beat = False, None
        self._fetched = {at: told for at, told in self._fetched.items() if at[0] in self._members}
        decode, prefill = self._pool(Role.DECODE), self._pool(Role.PREFILL)
        if not decode:  # those that finish up still answer, until their successors are known
            decode = self._pool(Role.DECODE, draining=True)
        members, self._n_decode = [*decode, *prefill], len(decode)
        self._nodes = {}
        for member in members:
            self._nodes.setdefault(member.replica.node, []).append(member)
        self._rows = [self._row(member) for member in members]
        self._names = tuple(row.name for row in self._rows)
        self._epochs = tuple(member.replica.epoch for member in members)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._places_of_epochs = {epoch: place for place, epoch in enumerate(self._epochs)}
        self._loads, self._curves = loads_of(self._rows), None
        self._tier_costs = TierCosts(len(members))
        for place, row in enumerate(self._rows):
            self._tier_costs.set(place, row.tiers)
        lenders = [member.replica for member in members if member.replica.peer_address]
        self._peers = {replica.name: replica.peer_address for replica in lenders}
        self._room_tokens = {replica.name: replica.room_tokens for replica in lenders}
        self._lending = Lending.of(self._names, self._peers, self._room_tokens)
        # Both are the same on every replica of a cluster.
        self._block_tokens = members[0].replica.block_tokens if members else 1
        self._kv_bytes_per_token = members[0].replica.kv_bytes_per_token if decode else 0

    def _pool(self, role: Role, draining: bool = False) -> list[Member]:
        """Those of a role that are up, by name, and finish up or do not."""
        return [
            member
            for _, member in sorted(self._members.items())
            if member.up and member.replica.role is role and member.load.draining is draining
        ]

    def _shown(self, name: str) -> Role | None:
        """The pool that has a row of this name."""
        place = self._places.get(name)
        if place is None:
            return None
        return Role.DECODE if place < self._n_decode else Role.PREFILL

    def _routable(self, name: str) -> Role | None:
        """The pool that it should be in: up, and not finishing up."""
        member = self._members.get(name)
        if member is None or not member.up or member.load.draining:
            return None
        return member.replica.role


def view_of(
    member: Member,
    sent: Taken,
    others: Taken = NOTHING,
    tiers: Mapping[Tier, TierLoad] | None = None,
    peer: FetchLoad | None = None,
) -> ReplicaView:
    """A replica's row, before anything is known of the prompt.

    Its report lags by up to a beat; what ingresses sent and it has not answered is known at once.
    What gives way is nobody's queue: it is counted apart. `tiers` and `peer` are taken for what it
    tells of these, if they are given.
    """
    replica, load, gives_way = member.replica, member.load, member.load.yielding
    tiers, peer = load.tiers if tiers is None else tiers, peer or load.peer
    unreported = member.requests - member.yielding
    unreported += sent.requests - sent.prefills + others.requests
    return ReplicaView(
        member.name,
        member.speed.curve,
        member.speed.step_s,
        max(load.pending_prefills - gives_way.pending_prefills, sent.prefills + others.prefills),
        max(
            load.pending_prefill_tokens - gives_way.pending_prefill_tokens,
            sent.prefill_tokens + others.prefill_tokens,
        ),
        load.waiting - gives_way.waiting,
        max(load.running - gives_way.running, unreported),
        replica.max_num_seqs,
        0,
        _tiers(tiers, member.fetching) if tiers else (),
        _unnamed(tiers),
        max(gives_way.waiting + gives_way.running, member.yielding),
        GUESSES[Tier.PEER] if peer is None else curve_of(peer),
    )


def _unnamed(told: Mapping[Tier, TierLoad]) -> Unnamed:
    if any(each.unnamed for tier, each in told.items() if tier is not Tier.VAULT):
        return Unnamed.OWN
    return Unnamed.VAULT if Tier.VAULT in told else Unnamed.NONE


def _fetches(member: Member, of_lossy: bool) -> int:
    """How many fetches its vault's curve is made from, of exact or of lossy blocks."""
    told = member.load.tiers.get(Tier.VAULT)
    counted = told if told is None or not of_lossy else told.lossy
    return 0 if counted is None else counted.samples


def _as_known(own: TierLoad, exact: Member | None, lossy: Member | None) -> TierLoad:
    """What one tells of the vault, at the costs that these know."""
    told = own
    if exact is not None and (other := exact.load.tiers[Tier.VAULT]) is not own:
        mine = {"blocks": own.blocks, "unnamed": own.unnamed, "lossy": own.lossy or other.lossy}
        told = msgspec.structs.replace(other, **mine)
    if lossy is not None:
        of_lossy = lossy.load.tiers[Tier.VAULT].lossy
        if of_lossy is not told.lossy:
            told = msgspec.structs.replace(told, lossy=of_lossy)
    return told


def _tiers(told: Mapping[Tier, TierLoad], fetching: Mapping[Tier, int]) -> tuple[TierView, ...]:
    """Those that a replica told of, in the order in which its engine asks them."""
    there = ((tier, told[tier], fetching.get(tier, 0)) for tier in TIER_ORDER if tier in told)
    return tuple(
        TierView(
            tier,
            _behind(each, n_bytes),
            0,
            None if each.lossy is None else _behind(each.lossy, n_bytes),
        )
        for tier, each, n_bytes in there
    )


def _behind(told: TierLoad | LossyLoad, n_bytes: int) -> LinkCurve:
    """Its curve for a fetch that comes behind others of so many bytes."""
    curve = curve_of(told)
    if not n_bytes:
        return curve
    return LinkCurve(curve.latency_s + curve.per_byte_s * n_bytes, curve.per_byte_s)
