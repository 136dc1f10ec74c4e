"""The books of one vault shard: which blocks it has, whose they are, and what holds them.

No bytes and no clock are here. Whoever keeps the bytes asks before it stores, obeys what `removed`
says, and passes the time, in seconds that never go back (an earlier time counts as the latest).
A put is reserved, written, and then acknowledged by `complete`; until then nobody can read it.
A block that is forgotten, expires or is dropped loses its name at once, and its bytes count until
its last reader's lease ends. Not for several threads at once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isnan

from kv.errors import VaultError
from kv.eviction import Entry, Leaves, Policy
from kv.vault.ends import Ends
from kv.vault.integrity import check
from kv.vault.orders import Cause, Lent, Outcome, Put, Quotas, Refusal, Removed, Verdict
from kv.vault.past import Past

# How long a writer has for one block.
WRITE_S = 30.0


@dataclass(frozen=True, slots=True)
class _NoRoom(Exception):
    refusal: Refusal
    detail: str


class Ledger:
    """See the module. Every operation costs O(log n) amortised for each block it names or removes;
    `forget` costs the tenant's blocks.
    """

    def __init__(self, quotas: Quotas, policy: Policy, write_s: float = WRITE_S) -> None:
        self._quotas = quotas
        self._policy = policy
        self._write_s = write_s
        self._entries: dict[bytes, Entry] = {}
        self._leaving: dict[bytes, tuple[Entry, Cause]] = {}  # nameless, still read by somebody
        self._children: Counter[bytes] = Counter()  # by parent, whether that is here or not
        self._keys: dict[str, set[bytes]] = {}  # by tenant
        self._bytes: Counter[str] = Counter()  # by tenant, leaving ones included
        self._total_bytes = 0
        self._past = Past()
        self._leaves = Leaves(policy)
        self._tenant_leaves: dict[str, Leaves] = {}
        self._leased: dict[str, set[bytes]] = {}  # by owner
        self._pinned: dict[str, set[bytes]] = {}  # by owner
        self._ends = Ends(self._everywhere)
        self._removed: list[Removed] = []
        self._now_s = -inf

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Bytes that are stored, being written, or still read after their block has gone."""
        return self._total_bytes

    def tenant_bytes(self, tenant: str) -> int:
        """The same of one tenant."""
        return self._bytes[tenant]

    # -- storing

    def begin(self, put: Put, now_s: float) -> Verdict:
        """Reserve room for a block, evicting what is worth less. Refused, it changes nothing."""
        self._advance(now_s)
        known = self._entries.get(put.key)
        if known is not None and known.writer is None:
            self._expire_at(known, max(known.expires_s, self._now_s + put.ttl_s))
            return self._answer(Outcome.STORED)
        if known is not None and known.writer != put.writer:
            return self._answer(Outcome.BUSY, f"{known.writer} writes it")
        if known is not None:  # the same writer asks again: its answer was lost
            return self._answer(Outcome.WRITE)
        if put.key in self._leaving:
            return self._answer(Outcome.BUSY, "its old bytes are still being read")
        return self._reserve(put)

    def complete(self, key: bytes, writer: str, now_s: float) -> bool:
        """Acknowledge a block whose bytes are in place. False if the reservation was no longer
        this writer's: the bytes are to be thrown away."""
        self._advance(now_s)
        entry = self._entries.get(key)
        if entry is None or entry.writer != writer:
            return False
        entry.writer, entry.writer_end_s = None, inf
        self._weigh(entry)
        return True

    def abort(self, key: bytes, writer: str, now_s: float) -> tuple[Removed, ...]:
        """The writer gives up. Somebody else's reservation, or none, is left as it is."""
        self._advance(now_s)
        entry = self._entries.get(key)
        if entry is not None and entry.writer == writer:
            self._remove(entry, Cause.WRITE_ENDED)
        return self._drained()

    # -- reading

    def depth(self, keys: Sequence[bytes], now_s: float) -> int:
        """How many of the leading `keys` can be read now. Uses nothing and holds nothing."""
        self._advance(now_s)
        return next((at for at, key in enumerate(keys) if not self._readable(key)), len(keys))

    def held(self, keys: Sequence[bytes], now_s: float) -> tuple[bool, ...]:
        """For each key whether it can be read now. Uses nothing and holds nothing."""
        self._advance(now_s)
        return tuple(map(self._readable, keys))

    def lease(self, keys: Sequence[bytes], owner: str, end_s: float, now_s: float) -> Lent:
        """Hold the leading blocks for a reader until `end_s` or its release, and count them used.

        An owner's second lease of a block replaces the first if it ends later.
        """
        depth = self.depth(keys, now_s)
        for key in keys[:depth]:
            entry = self._entries[key]
            entry.hits += 1
            entry.last_used_s = self._now_s
            self._policy.seen(entry, self._now_s)
            if end_s > max(self._now_s, entry.leases.get(owner, -inf)):
                entry.leases[owner] = end_s
                self._leased.setdefault(owner, set()).add(key)
                self._ends.watch(end_s, key)
            self._weigh(entry)
        return Lent(depth, self._drained())

    def release(self, owner: str, now_s: float) -> tuple[Removed, ...]:
        """End all leases of one owner; without any it changes nothing."""
        self._advance(now_s)
        for key in self._leased.pop(owner, set()):
            entry = self._anywhere(key)
            del entry.leases[owner]
            self._settle(entry)
        return self._drained()

    def pin(self, keys: Sequence[bytes], owner: str, now_s: float) -> Lent:
        """Keep the leading blocks until `unpin`, past their time to live."""
        depth = self.depth(keys, now_s)
        for key in keys[:depth]:
            entry = self._entries[key]
            entry.pins.add(owner)
            self._pinned.setdefault(owner, set()).add(key)
            self._weigh(entry)
        return Lent(depth, self._drained())

    def unpin(self, owner: str, now_s: float) -> tuple[Removed, ...]:
        """Release all that one owner has pinned; what has expired meanwhile goes."""
        self._advance(now_s)
        for key in self._pinned.pop(owner, set()):
            entry = self._entries[key]
            entry.pins.discard(owner)
            self._settle(entry)
        return self._drained()

    # -- losing

    def drop(self, keys: Iterable[bytes], now_s: float) -> tuple[Removed, ...]:
        """These blocks' bytes were found wrong or lost: nobody gets them any more, even pinned."""
        self._advance(now_s)
        for key in keys:
            if key in self._entries:
                self._remove(self._entries[key], Cause.DROPPED)
        return self._drained()

    def forget(self, tenant: str, now_s: float) -> tuple[Removed, ...]:
        """Erase a tenant: all its blocks, pinned, leased and half written ones included, lose their
        names at once."""
        self._advance(now_s)
        self._past.forget(tenant)
        for key in list(self._keys.get(tenant, ())):
            self._remove(self._entries[key], Cause.FORGOTTEN)
        return self._drained()

    def advance(self, now_s: float) -> tuple[Removed, ...]:
        """What is gone because leases, writes or lives have ended."""
        self._advance(now_s)
        return self._drained()

    # -- the books

    def check_integrity(self) -> None:
        """Recount everything. Raises VaultError for the first book that does not balance."""
        check(self)

    def _reserve(self, put: Put) -> Verdict:
        hits, generation = self._history(put)
        entry = Entry(
            key=put.key,
            parent=put.parent,
            tenant=put.tenant,
            n_bytes=put.n_bytes,
            seconds_saved=put.seconds_saved,
            last_used_s=self._now_s,
            hits=hits,
            generation=generation,
        )
        # Learned from before the decision: a block that is refused may be asked for again too.
        self._policy.seen(entry, self._now_s)
        try:
            self._make_room(entry)
        except _NoRoom as full:
            self._remember(entry)
            return self._answer(Outcome.REFUSED, full.detail, full.refusal)
        entry.writer, entry.writer_end_s = put.writer, self._now_s + self._write_s
        self._enter(entry)
        self._ends.watch(entry.writer_end_s, entry.key)
        self._expire_at(entry, self._now_s + put.ttl_s)
        return self._answer(Outcome.WRITE)

    def _history(self, put: Put) -> tuple[int, int]:
        """Hits and generation: those it had if it was here before, being asked for once more."""
        past = self._past.recall(put.tenant, put.key)
        if past is not None:
            return past[0] + 1, past[1]
        parent = self._entries.get(put.parent) if put.parent is not None else None
        return 0, 0 if parent is None else parent.generation + (parent.hits > 0)

    def _remember(self, entry: Entry) -> None:
        stored_blocks = len(self._keys.get(entry.tenant, ()))
        self._past.remember(entry.tenant, entry.key, entry.hits, entry.generation, stored_blocks)

    def _make_room(self, entry: Entry) -> None:
        """Evict until the block fits, or put everything back and raise."""
        quota_bytes = self._quotas.of(entry.tenant)
        if entry.n_bytes > quota_bytes:
            detail = f"{entry.n_bytes} bytes, {quota_bytes} for {entry.tenant}"
            raise _NoRoom(Refusal.LARGER_THAN_QUOTA, detail)
        worth = self._policy.rank(entry, self._now_s).worth
        victims: list[tuple[Entry, Cause]] = []
        try:
            while (cause := self._lacking(entry)) is not None:
                victim = self._victim(entry, worth, cause)
                self._leave(victim)
                victims.append((victim, cause))
        except _NoRoom:
            for victim, _ in reversed(victims):
                self._enter(victim)
            raise
        for victim, cause in victims:
            self._remember(victim)
            self._removed.append(Removed(victim.key, victim.n_bytes, cause))

    def _lacking(self, entry: Entry) -> Cause | None:
        quota_bytes = self._quotas.of(entry.tenant)
        over = self._bytes[entry.tenant] + entry.n_bytes > quota_bytes
        if over and quota_bytes < self._quotas.total_bytes:
            return Cause.QUOTA
        if self._total_bytes + entry.n_bytes > self._quotas.total_bytes:
            return Cause.SPACE
        return None

    def _victim(self, entry: Entry, worth: float, cause: Cause) -> Entry:
        own = cause is Cause.QUOTA
        leaves = self._of_tenant(entry.tenant) if own else self._leaves
        # The block before it is no leaf once this one is here.
        found = leaves.lowest(self._now_s, entry.parent)
        if found is None:
            used_bytes = self._bytes[entry.tenant] if own else self._total_bytes
            quota_bytes = self._quotas.of(entry.tenant) if own else self._quotas.total_bytes
            detail = f"{used_bytes} of {quota_bytes} bytes used and none can go"
            raise _NoRoom(Refusal.TENANT_HELD if own else Refusal.ALL_HELD, detail)
        victim, rank = found
        if rank.worth > worth:
            detail = f"rank {worth:.3g}, the lowest stored {rank.worth:.3g}"
            raise _NoRoom(Refusal.WORTH_LESS, detail)
        return victim

    def _enter(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self._keys.setdefault(entry.tenant, set()).add(entry.key)
        self._charge(entry, entry.n_bytes)
        if entry.parent is not None:
            self._children[entry.parent] += 1
            self._weigh_key(entry.parent)
        self._weigh(entry)

    def _leave(self, entry: Entry, freed: bool = True) -> None:
        """The block has no name any more; `freed` tells whether its bytes are gone as well."""
        del self._entries[entry.key]
        self._keys[entry.tenant].remove(entry.key)
        if not self._keys[entry.tenant]:
            del self._keys[entry.tenant]
        self._withdraw(entry)
        if entry.parent is not None:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
            self._weigh_key(entry.parent)
        if freed:
            self._charge(entry, -entry.n_bytes)

    def _charge(self, entry: Entry, n_bytes: int) -> None:
        self._total_bytes += n_bytes
        self._bytes[entry.tenant] += n_bytes
        if not self._bytes[entry.tenant]:
            del self._bytes[entry.tenant]
            self._tenant_leaves.pop(entry.tenant, None)

    def _remove(self, entry: Entry, cause: Cause) -> None:
        for owner in entry.pins:
            self._disown(self._pinned, owner, entry.key)
        entry.pins.clear()
        entry.writer = None
        self._leave(entry, freed=not entry.leases)
        if entry.leases:
            self._leaving[entry.key] = (entry, cause)
        else:
            self._removed.append(Removed(entry.key, entry.n_bytes, cause))

    def _settle(self, entry: Entry) -> None:
        """What became of a block as something that held it, or its life, has ended."""
        for owner in [owner for owner, end_s in entry.leases.items() if end_s <= self._now_s]:
            del entry.leases[owner]
            self._disown(self._leased, owner, entry.key)
        if entry.key in self._leaving:
            self._settle_leaving(entry)
        elif entry.writer is not None and entry.writer_end_s <= self._now_s:
            self._remove(entry, Cause.WRITE_ENDED)
        elif entry.expires_s <= self._now_s and not entry.pins:
            self._remove(entry, Cause.EXPIRED)
        else:
            self._weigh(entry)

    def _settle_leaving(self, entry: Entry) -> None:
        if not entry.leases:
            _, cause = self._leaving.pop(entry.key)
            self._charge(entry, -entry.n_bytes)
            self._removed.append(Removed(entry.key, entry.n_bytes, cause))

    def _weigh_key(self, key: bytes) -> None:
        if key in self._entries:
            self._weigh(self._entries[key])

    def _weigh(self, entry: Entry) -> None:
        """Let it go or stay, as its holders and children have it; ranked as of now."""
        if entry.held or entry.key in self._children:
            self._withdraw(entry)
            return
        self._leaves.offer(entry, self._now_s)
        self._of_tenant(entry.tenant).offer(entry, self._now_s)

    def _withdraw(self, entry: Entry) -> None:
        self._leaves.withdraw(entry.key)
        self._of_tenant(entry.tenant).withdraw(entry.key)

    def _of_tenant(self, tenant: str) -> Leaves:
        if tenant not in self._tenant_leaves:
            self._tenant_leaves[tenant] = Leaves(self._policy)
        return self._tenant_leaves[tenant]

    def _readable(self, key: bytes) -> bool:
        entry = self._entries.get(key)
        # A pinned block outlives its time for those who pinned it and for readers alike.
        return entry is not None and entry.writer is None

    def _anywhere(self, key: bytes) -> Entry:
        return self._entries[key] if key in self._entries else self._leaving[key][0]

    @staticmethod
    def _disown(held: dict[str, set[bytes]], owner: str, key: bytes) -> None:
        held[owner].discard(key)
        if not held[owner]:
            del held[owner]

    def _expire_at(self, entry: Entry, expires_s: float) -> None:
        entry.expires_s = expires_s
        self._ends.watch(expires_s, entry.key)

    def _everywhere(self) -> list[Entry]:
        """What has a name, and what is still read without one."""
        return [*self._entries.values(), *(entry for entry, _ in self._leaving.values())]

    def _advance(self, now_s: float) -> None:
        if isnan(now_s):
            raise VaultError("vault clock", f"{now_s} s", "give a number")
        self._now_s = max(self._now_s, now_s)
        for key in self._ends.due(self._now_s):
            if key in self._entries or key in self._leaving:
                self._settle(self._anywhere(key))

    def _answer(
        self, outcome: Outcome, detail: str = "", refusal: Refusal | None = None
    ) -> Verdict:
        return Verdict(outcome, refusal, detail, self._drained())

    def _drained(self) -> tuple[Removed, ...]:
        removed, self._removed = tuple(self._removed), []
        return removed
