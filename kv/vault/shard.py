"""What a vault shard does with each message: its books and its memory together, without sockets.

Clients write into the shard's memory and read from it while the shard does something else, so an
order is never enough. A put is acknowledged only when the frame that its client told lies whole in
its slot. A grant that ends leaves the slot in quarantine: nameless, and nobody else's, until its
client says that it writes no more or is gone for `settle_s`. A block that a reader found damaged is
looked at again here and dropped if that is so.

With a disk extent a block is written there before it is acknowledged; memory then holds what was
used last, and a block that is not there is loaded when somebody asks for it. Times are seconds of
the caller's clock. Not for several threads at once.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from kv.codecs.frame import read_frame, told_checksum
from kv.errors import CodecError, VaultError
from kv.eviction import Policy
from kv.vault import note, wire
from kv.vault.arena import trimmed
from kv.vault.ledger import Ledger
from kv.vault.orders import Outcome, Put, Quotas, Removed
from kv.vault.slots import Phase, Slot, Slots
from kv.vault.wire import Offer, Reason, Verdict

# Above what a block takes on disk beside its frame (`SegmentStore.frame_bytes`).
_EXTENT_OVERHEAD_BYTES = 512
# Puts of an erased tenant that were under way when it was are refused for so long.
_FORGOTTEN_S = 60.0
_RESTART = "restart"

# A client and the number of its message.
_Owner = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a client has to write what it was granted and to read what it was lent, how long
    bytes may still arrive after its connection has gone, and for how long a reader that asks for
    more is lent blocks at most."""

    write_s: float = 30.0
    lease_s: float = 10.0
    settle_s: float = 2.0
    most_lease_s: float = 120.0


@dataclass(slots=True, eq=False)
class Delivery:
    """The slots of one Written, and why those that are not whole are refused."""

    number: int
    writer: str
    slots: list[Slot]
    reasons: list[Reason | None]


@dataclass(slots=True, eq=False)
class _Reading:
    end_s: float
    keys: Sequence[bytes]
    slots: list[Slot] = field(default_factory=list)


class Shard:
    """See the module. Raises VaultError where `quotas` exceed the memory and there is no extent."""

    def __init__(
        self,
        memory: memoryview,
        quotas: Quotas,
        policy: Policy,
        terms: Terms | None = None,
        extent: bool = False,
    ) -> None:
        self._slots = Slots(memory, extent)
        self._extent, self._terms = extent, terms or Terms()
        if not extent and quotas.total_bytes > self._slots.arena.n_bytes:
            raise VaultError(
                "vault shard",
                f"{quotas.total_bytes} bytes to store, {self._slots.arena.n_bytes} of memory",
                "lower the quota, or give it a disk extent",
            )
        self._ledger = Ledger(quotas, policy, self._terms.write_s)
        self._grants: dict[_Owner, list[Slot]] = {}
        self._readings: dict[_Owner, _Reading] = {}
        self._settling: list[tuple[float, list[Slot]]] = []
        self._forgotten: dict[str, float] = {}
        self._deleted: list[bytes] = []

    # -- storing

    def grant(self, client: str, put: wire.Put, now_s: float) -> wire.Granted:
        """Room for what is to be stored, and why not for the rest."""
        owner, granted = (client, put.number), list[Slot]()
        if owner in self._grants:
            refused = Verdict(Outcome.REFUSED, Reason.MALFORMED)
            return wire.Granted(put.number, (refused,) * len(put.offers), self._terms.write_s)
        verdicts = tuple(self._grant(owner, put, offer, granted, now_s) for offer in put.offers)
        if granted:
            self._grants[owner] = granted
        return wire.Granted(put.number, verdicts, self._terms.write_s)

    def written(self, client: str, message: wire.Written, now_s: float) -> Delivery:
        """Look at what a client says it has written; its slots are the shard's own from now on.

        What is whole is to be made durable, where there is an extent, and then acknowledged."""
        self.advance(now_s)
        owner = (client, message.number)
        delivery = Delivery(message.number, _name(owner), self._grants.pop(owner, []), [])
        for at, slot in enumerate(delivery.slots):
            told = message.checksums[at] if at < len(message.checksums) else None
            reason = self._check(slot, told)
            delivery.reasons.append(reason)
            if reason is not None:
                self._refuse(slot, delivery.writer, now_s)
        return delivery

    def frames(self, delivery: Delivery, wall_s: float) -> list[tuple[bytes, bytes, memoryview]]:
        """Key, note and frame of each block to be made durable, to be asked for as that begins. The
        frames stay where they are until `acknowledge`."""
        return [
            (slot.key, note.packed(slot.put, wall_s), self._slots.frame(slot))
            for slot in delivery.slots
            if slot.phase is Phase.CHECKED and slot.named and slot.put is not None
        ]

    def acknowledge(
        self, delivery: Delivery, durable: Container[bytes] | None, now_s: float
    ) -> wire.Stored:
        """Blocks in `durable`, or all where there is no extent (None), can be read from now on."""
        self.advance(now_s)
        reasons = [
            reason or self._acknowledge(slot, delivery.writer, durable, now_s)
            for slot, reason in zip(delivery.slots, delivery.reasons, strict=True)
        ]
        return wire.Stored(delivery.number, tuple(map(_stored, reasons)))

    # -- reading

    def held(self, has: wire.Has, now_s: float) -> wire.Held:
        """Which blocks there are, on disk alone too."""
        return wire.Held(has.number, self._ledger.held(has.keys, now_s))

    def lend(self, client: str, get: wire.Get, now_s: float) -> tuple[bytes, ...]:
        """Hold the leading blocks for a reader. Those returned are on disk alone: each is to be
        read there and told to `admit` before `lent`."""
        owner = (client, get.number)
        self._end_reading(owner, now_s)
        end_s = now_s + self._lease_s(get)
        lent = self._ledger.lease(get.keys, _name(owner), end_s, now_s)
        self._free(lent.removed)
        held = get.keys[: lent.depth]
        self._readings[owner] = _Reading(end_s, held)
        missing = dict.fromkeys(key for key in held if not self._held(key, owner))
        return tuple(missing)

    def admit(
        self, client: str, number: int, key: bytes, frame: bytes | None, now_s: float
    ) -> bool:
        """What the disk has of a block; None where it is gone or damaged. False: it cannot be
        lent, and none behind it need be read."""
        owner = (client, number)
        if frame is None:
            self.drop((key,), now_s)
        elif owner in self._readings and not self._held(key, owner):
            self._load(key, frame, owner, now_s)
        return owner in self._readings and self._held(key, owner)

    def lent(self, client: str, get: wire.Get, now_s: float) -> wire.Lent:
        """Where the leading blocks lie, as many as are in memory and held. A reader that is lent
        none has nothing to be done with, and says no Done."""
        self.advance(now_s)
        owner = (client, get.number)
        reading = self._readings.get(owner)
        for key in reading.keys if reading is not None else ():
            slot = self._slots.find(key)
            if reading is None or slot is None or _name(owner) not in slot.readers:
                break
            reading.slots.append(slot)
        slots = reading.slots if reading is not None else []
        if not slots:
            self._end_reading(owner, now_s)
        places = [wire.Place(trimmed(s.extents, s.n_bytes), s.checksum) for s in slots]
        return wire.Lent(get.number, tuple(places), self._lease_s(get))

    def _lease_s(self, get: wire.Get) -> float:
        """Blocks that cross a slow network are lent for longer."""
        return max(self._terms.lease_s, min(get.wanted_s, self._terms.most_lease_s))

    def done(self, client: str, message: wire.Done, now_s: float) -> tuple[bytes, ...]:
        """The reader is done. Returns the keys of blocks that it found damaged and that are."""
        owner = (client, message.number)
        reading = self._readings.get(owner)
        found = [] if reading is None else reading.slots
        told = [found[at] for at in message.damaged if at < len(found)]
        damaged = tuple(s.key for s in told if s.named and not self._slots.whole(s, s.checksum))
        self.drop(damaged, now_s)
        self._end_reading(owner, now_s)
        return damaged

    # -- losing

    def drop(self, keys: Iterable[bytes], now_s: float) -> None:
        """These blocks' bytes are wrong: nobody gets them any more."""
        self._free(self._ledger.drop(keys, now_s))

    def forget(self, tags: Iterable[str], now_s: float) -> tuple[int, int]:
        """Erase tenants: how many blocks lost their names, and how many bytes are still read or
        may still be written. What is on disk is the caller's to erase, before anything else."""
        tags, before = frozenset(tags), len(self._ledger)
        ended = {tag: end_s for tag, end_s in self._forgotten.items() if end_s > now_s}
        self._forgotten = ended | dict.fromkeys(tags, now_s + _FORGOTTEN_S)
        for tag in tags:
            self._free(self._ledger.forget(tag, now_s))
        in_use_bytes = sum(self._ledger.tenant_bytes(tag) for tag in tags)
        quarantined = (slot for slot in self._quarantined() if slot.put is not None)
        in_use_bytes += sum(s.n_bytes for s in quarantined if s.put and s.put.tenant in tags)
        return before - len(self._ledger), in_use_bytes

    def gone(self, client: str, now_s: float) -> None:
        """A client's connection has ended: it reads and, once bytes under way have settled,
        writes no more."""
        for owner in [owner for owner in self._readings if owner[0] == client]:
            self._end_reading(owner, now_s)
        for owner in [owner for owner in self._grants if owner[0] == client]:
            slots = self._grants.pop(owner)
            for slot in slots:
                self._free(self._ledger.abort(slot.key, _name(owner), now_s))
            self._settling.append((now_s + self._terms.settle_s, slots))

    def advance(self, now_s: float) -> None:
        """End what has come to its end."""
        self._free(self._ledger.advance(now_s))
        for owner in [o for o, reading in self._readings.items() if reading.end_s <= now_s]:
            self._end_reading(owner, now_s)
        for end_s, slots in self._settling:
            if end_s <= now_s:
                for slot in slots:
                    self._slots.release(slot)
        self._settling = [each for each in self._settling if each[0] > now_s]

    def deleted(self) -> tuple[bytes, ...]:
        """Keys to be deleted on disk since the last call, before anything is made durable."""
        deleted, self._deleted = tuple(self._deleted), []
        return deleted

    def restore(
        self, notes: Iterable[tuple[bytes, bytes, int]], wall_s: float, now_s: float
    ) -> int:
        """Enter what the disk holds, at `wall_s` seconds since 1970; how many blocks. What is not
        entered is among `deleted`."""
        for key, packed, n_bytes in notes:
            try:
                put = note.unpacked(key, packed, self._charge(n_bytes), _RESTART, wall_s)
            except VaultError:
                put = None
            verdict = None if put is None else self._ledger.begin(put, now_s)
            self._free(() if verdict is None else verdict.removed)
            if verdict is None or verdict.outcome is not Outcome.WRITE:
                self._deleted.append(key)
            else:
                self._ledger.complete(key, _RESTART, now_s)
        return len(self._ledger)

    def holds(self, client: str) -> bool:
        """Whether a client is writing or reading."""
        return any(owner[0] == client for owner in (*self._grants, *self._readings))

    def stats(self, number: int) -> wire.Stats:
        """What there is now."""
        return wire.Stats(
            number=number,
            blocks=len(self._ledger),
            stored_bytes=self._ledger.n_bytes,
            free_bytes=self._slots.arena.free_bytes,
            quarantined_bytes=sum(slot.n_bytes for slot in self._quarantined()),
            leases=len(self._readings),
            resident_bytes=self._slots.resident_bytes,
        )

    # -- one block

    def _charge(self, n_bytes: int) -> int:
        overhead_bytes = _EXTENT_OVERHEAD_BYTES if self._extent else 0
        return self._slots.arena.charge(n_bytes + overhead_bytes)

    def _grant(
        self, owner: _Owner, put: wire.Put, offer: Offer, granted: list[Slot], now_s: float
    ) -> Verdict:
        if self._forgotten.get(put.tenant, now_s) > now_s:
            return Verdict(Outcome.REFUSED, Reason.FORGOTTEN)
        if any(slot.key == offer.key for slot in granted):
            return Verdict(Outcome.BUSY, "named twice")
        try:
            order = self._order(owner, put.tenant, offer)
        except VaultError:
            return Verdict(Outcome.REFUSED, Reason.MALFORMED)
        verdict = self._ledger.begin(order, now_s)
        self._free(verdict.removed)
        if verdict.outcome is not Outcome.WRITE:
            return Verdict(verdict.outcome, verdict.refusal or verdict.detail)
        slot = self._slots.open(offer.key, put.codec, offer.n_bytes, order)
        if slot is None:
            self._free(self._ledger.abort(offer.key, order.writer, now_s))
            return Verdict(Outcome.REFUSED, Reason.NO_MEMORY)
        granted.append(slot)
        return Verdict(Outcome.WRITE, "", trimmed(slot.extents, slot.n_bytes))

    def _order(self, owner: _Owner, tenant: str, offer: Offer) -> Put:
        return Put(
            key=offer.key,
            parent=offer.parent,
            tenant=tenant,
            writer=_name(owner),
            n_bytes=self._charge(offer.n_bytes),
            seconds_saved=offer.seconds_saved,
            **({} if offer.ttl_s is None else {"ttl_s": offer.ttl_s}),
        )

    def _check(self, slot: Slot, told: int | None) -> Reason | None:
        if not slot.named:
            return Reason.LATE
        if told is None:
            return Reason.NOT_WRITTEN
        if not self._slots.whole(slot, told):
            return Reason.DAMAGED
        slot.phase, slot.checksum = Phase.CHECKED, told
        return None

    def _acknowledge(
        self, slot: Slot, writer: str, durable: Container[bytes] | None, now_s: float
    ) -> Reason | None:
        """The grant may have ended, and the tenant been forgotten, while the disk was busy."""
        if not slot.named:
            self._slots.release(slot)
            return Reason.LATE
        if durable is not None and slot.key not in durable:
            self._refuse(slot, writer, now_s)
            return Reason.DISK
        if not self._ledger.complete(slot.key, writer, now_s):
            raise VaultError(f"put of {slot.key.hex()}", "named without a reservation", "report it")
        self._slots.store(slot)
        return None

    def _refuse(self, slot: Slot, writer: str, now_s: float) -> None:
        """Its client writes no more: its memory is free at once."""
        if slot.named:
            self._free(self._ledger.abort(slot.key, writer, now_s))
        self._slots.release(slot)

    def _held(self, key: bytes, owner: _Owner) -> bool:
        """Let a reader keep a block in memory, if it is there."""
        slot = self._slots.find(key)
        if slot is None or slot.phase is not Phase.STORED:
            return False
        slot.readers.add(_name(owner))
        self._slots.touch(slot)
        return True

    def _load(self, key: bytes, frame: bytes, owner: _Owner, now_s: float) -> None:
        """Into memory from disk, unless it was forgotten meanwhile. Blocks further on that the same
        reader holds make room for it."""
        if self._slots.find(key) is not None or not self._ledger.depth((key,), now_s):
            return
        try:
            codec = read_frame(frame).codec
        except CodecError:
            self.drop((key,), now_s)
            return
        further = list(self._readings[owner].keys)
        further = further[further.index(key) + 1 :]
        while (slot := self._slots.open(key, codec, len(frame))) is None and further:
            self._let_go(further.pop(), owner)
        if slot is not None:
            self._slots.fill(slot, memoryview(frame))
            slot.checksum = told_checksum(frame)
            self._slots.store(slot)

    def _end_reading(self, owner: _Owner, now_s: float) -> None:
        reading = self._readings.pop(owner, None)
        if reading is None:
            return
        for key in reading.keys:
            self._let_go(key, owner)
        self._free(self._ledger.release(_name(owner), now_s))

    def _let_go(self, key: bytes, owner: _Owner) -> None:
        slot = self._slots.find(key)
        if slot is not None:
            slot.readers.discard(_name(owner))

    def _free(self, removed: Iterable[Removed]) -> None:
        for each in removed:
            if self._extent:
                self._deleted.append(each.key)
            slot = self._slots.unname(each.key)
            # One whose client may write stays where it is; one on its way to disk until that ends.
            if slot is not None and slot.phase is Phase.STORED:
                self._slots.release(slot)

    def _quarantined(self) -> Iterable[Slot]:
        for slots in (*self._grants.values(), *(slots for _, slots in self._settling)):
            yield from (slot for slot in slots if not slot.named)


def _name(owner: _Owner) -> str:
    return f"{owner[0]}/{owner[1]}"


def _stored(reason: Reason | None) -> Verdict:
    return Verdict(Outcome.STORED) if reason is None else Verdict(Outcome.REFUSED, reason)
