"""What a shard does while clients write and read its memory whenever they like."""

from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv.codecs.frame import told_checksum
from kv.errors import VaultError
from kv.eviction import Lru
from kv.vault import wire
from kv.vault.arena import GRANULE_BYTES, Extent
from kv.vault.orders import Outcome, Quotas, Refusal
from kv.vault.shard import Delivery, Shard, Terms
from kv.vault.wire import Reason
from tests.unit.kv.vault_frames import frame_of

TERMS = Terms(write_s=10.0, lease_s=5.0, settle_s=1.0, most_lease_s=20.0)
FRAME = frame_of(1, 1000)
PAGE = GRANULE_BYTES


@dataclass
class Grant:
    """What a client was granted and may write, until it says that it is done."""

    client: str
    number: int
    keys: list[bytes]
    frames: list[bytes]
    extents: list[tuple[Extent, ...]]
    gone_s: float = inf


@dataclass
class World:
    """One shard with its memory and a disk that does as it is told."""

    n_pages: int = 8
    extent_pages: int = 0
    tenants: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = bytearray(self.n_pages * PAGE)
        self.disk: dict[bytes, tuple[bytes, bytes]] = {}
        total_bytes = (self.extent_pages or self.n_pages) * PAGE
        self.shard = Shard(
            memoryview(self.memory),
            Quotas(total_bytes, self.tenants),
            Lru(),
            TERMS,
            extent=self.extent_pages > 0,
        )
        self.now_s = 0.0
        self.number = 0

    def obey(self) -> None:
        for key in self.shard.deleted():
            self.disk.pop(key, None)

    def put(
        self,
        client: str,
        blocks: dict[bytes, bytes],
        tenant: str = "t",
        ttl_s: float | None = None,
        codec: str = "raw",
    ) -> tuple[Grant, list[wire.Verdict]]:
        self.number += 1
        offers = tuple(wire.Offer(k, None, len(f), 1.0, ttl_s) for k, f in blocks.items())
        put = wire.Put(self.number, tenant, codec, offers)
        verdicts = list(self.shard.grant(client, put, self.now_s).verdicts)
        granted = [
            (key, frame, verdict.extents)
            for (key, frame), verdict in zip(blocks.items(), verdicts, strict=True)
            if verdict.outcome is Outcome.WRITE
        ]
        self.obey()
        keys, frames, extents = ([each[at] for each in granted] for at in range(3))
        return Grant(client, self.number, keys, frames, extents), verdicts  # type: ignore[arg-type]

    def write(self, grant: Grant, noise: bytes | None = None) -> None:
        """The frames, or noise in their places."""
        for frame, extents in zip(grant.frames, grant.extents, strict=True):
            left = memoryview(noise * len(frame) if noise else frame)
            for offset, n_bytes in extents:
                self.memory[offset : offset + n_bytes] = left[:n_bytes]
                left = left[n_bytes:]

    def deliver(self, grant: Grant) -> Delivery:
        checksums = tuple(told_checksum(frame) for frame in grant.frames)
        message = wire.Written(grant.number, checksums)
        return self.shard.written(grant.client, message, self.now_s)

    def acknowledge(self, delivery: Delivery, fails: bool = False) -> list[wire.Verdict]:
        self.obey()
        durable = None
        if self.extent_pages:
            frames = [] if fails else self.shard.frames(delivery, 1e9 + self.now_s)
            self.disk.update((key, (note, bytes(frame))) for key, note, frame in frames)
            durable = {key for key, _, _ in frames}
        verdicts = list(self.shard.acknowledge(delivery, durable, self.now_s).verdicts)
        self.obey()
        return verdicts

    def finish(self, grant: Grant) -> list[wire.Verdict]:
        return self.acknowledge(self.deliver(grant))

    def store(self, client: str, blocks: dict[bytes, bytes], **kwargs: object) -> list[str]:
        """All the steps of a put; what became of each block."""
        grant, verdicts = self.put(client, blocks, **kwargs)  # type: ignore[arg-type]
        self.write(grant)
        stored = iter(self.finish(grant))
        finals = [next(stored) if v.outcome is Outcome.WRITE else v for v in verdicts]
        return [v.reason or str(v.outcome) for v in finals]

    def lend(
        self, client: str, keys: list[bytes], wanted_s: float = 0.0
    ) -> tuple[int, list[tuple[int, bytes]]]:
        """The number of a get, and checksum and bytes of what was lent."""
        self.number += 1
        get = wire.Get(self.number, tuple(keys), wanted_s)
        for key in self.shard.lend(client, get, self.now_s):
            self.obey()
            frame = self.disk[key][1] if key in self.disk else None
            self.shard.admit(client, self.number, key, frame, self.now_s)
        lent = self.shard.lent(client, get, self.now_s)
        return self.number, [(place.checksum, self.read(place.extents)) for place in lent.places]

    def read(self, extents: tuple[Extent, ...]) -> bytes:
        return b"".join(self.memory[offset : offset + n_bytes] for offset, n_bytes in extents)

    def has(self, key: bytes, frame: bytes = FRAME) -> bool:
        """Whether a reader gets this block, and rightly."""
        number, lent = self.lend("reader", [key])
        self.shard.done("reader", wire.Done(number), self.now_s)
        assert lent in ([], [(told_checksum(frame), frame)])
        return bool(lent)

    def check(self) -> None:
        """The books balance, and what is free is zeros."""
        shard = self.shard
        shard._ledger.check_integrity()
        arena = shard._slots.arena
        arena.check_integrity()
        for start, length in arena._lengths.items():
            assert self.memory.count(0, start, start + length) == length


some_client = st.sampled_from(["c0", "c1", "c2"])
some_key = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
some_size = st.sampled_from([500, 4096, 5000, 9000])


class ShardAgainstCarelessClients(RuleBasedStateMachine):
    """Clients write late, die, lie about what they wrote and forget to say that they are done; the
    disk fails. Whoever is lent a block reads what was acknowledged for its key, nothing else."""

    @initialize(extent=st.booleans(), own=st.integers(2, 9))
    def start(self, extent: bool, own: int) -> None:
        self.world = World(6, 12 if extent else 0, {"t0": own * PAGE})
        self.grants: list[Grant] = []
        self.deliveries: list[tuple[Grant, Delivery]] = []
        self.lent: list[tuple[str, int, float, list[tuple[tuple[Extent, ...], bytes]]]] = []
        self.truth: dict[bytes, bytes] = {}
        self.seed = 0

    @rule(client=some_client, keys=st.sets(some_key, min_size=1, max_size=3), size=some_size)
    def put(self, client: str, keys: set[bytes], size: int) -> None:
        blocks = {}
        for key in sorted(keys):
            self.seed += 1
            blocks[key] = frame_of(self.seed, size)
        grant, _ = self.world.put(client, blocks, tenant=f"t{len(keys) % 2}", ttl_s=40.0)
        if grant.keys:
            self.grants.append(grant)

    @rule(data=st.data(), honest=st.booleans())
    def write(self, data: st.DataObject, honest: bool) -> None:
        """A client may write until it says that it is done, whatever became of its grant."""
        if self.grants:
            grant = data.draw(st.sampled_from(self.grants))
            if self.world.now_s < grant.gone_s:
                self.world.write(grant, None if honest else b"\xee")

    @rule(data=st.data())
    def written(self, data: st.DataObject) -> None:
        living = [grant for grant in self.grants if grant.gone_s == inf]
        if living:
            grant = data.draw(st.sampled_from(living))
            self.grants.remove(grant)
            self.deliveries.append((grant, self.world.deliver(grant)))

    @rule(data=st.data(), fails=st.booleans())
    def acknowledge(self, data: st.DataObject, fails: bool) -> None:
        if not self.deliveries:
            return
        grant, delivery = self.deliveries.pop(data.draw(st.integers(0, len(self.deliveries) - 1)))
        verdicts = self.world.acknowledge(delivery, fails)
        assert len(verdicts) == len(grant.keys)
        for key, frame, verdict in zip(grant.keys, grant.frames, verdicts, strict=True):
            if verdict.outcome is Outcome.STORED:
                self.truth[key] = frame

    @rule(
        client=some_client,
        keys=st.lists(some_key, min_size=1, max_size=4, unique=True),
        wanted_s=st.sampled_from([0.0, 3.0, 10.0, 300.0]),
    )
    def get(self, client: str, keys: list[bytes], wanted_s: float) -> None:
        number, lent = self.world.lend(client, keys, wanted_s)
        lease_s = min(max(TERMS.lease_s, wanted_s), TERMS.most_lease_s)
        for key, (checksum, frame) in zip(keys, lent, strict=False):
            assert frame == self.truth[key]
            assert checksum == told_checksum(frame)
        reading = self.world.shard._readings.get((client, number))
        assert bool(lent) == (reading is not None)
        if reading is None:
            return
        held = [(slot.extents, self.world.read(slot.extents)) for slot in reading.slots]
        self.lent.append((client, number, self.world.now_s + lease_s, held))

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        if self.lent:
            client, number, _, _ = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
            self.world.shard.done(client, wire.Done(number), self.world.now_s)
            self.world.obey()

    @rule(client=some_client)
    def die(self, client: str) -> None:
        """What it wrote last may still arrive for as long as bytes settle."""
        self.world.shard.gone(client, self.world.now_s)
        self.world.obey()
        for grant in self.grants:
            if grant.client == client:
                grant.gone_s = min(grant.gone_s, self.world.now_s + TERMS.settle_s)
        self.lent = [each for each in self.lent if each[0] != client]

    @rule(tenant=st.sampled_from(["t0", "t1"]))
    def forget(self, tenant: str) -> None:
        self.world.shard.forget([tenant], self.world.now_s)
        self.world.obey()

    @rule(passed_s=st.sampled_from([0.5, 1.0, 3.0, 6.0, 70.0]))
    def wait(self, passed_s: float) -> None:
        self.world.now_s += passed_s
        self.world.shard.advance(self.world.now_s)
        self.world.obey()

    @invariant()
    def readers_read_what_they_were_lent(self) -> None:
        if not hasattr(self, "world"):
            return
        for _, _, end_s, held in self.lent:
            if self.world.now_s < end_s:
                assert all(self.world.read(extents) == frame for extents, frame in held)
        self.world.check()


TestCarelessClients = ShardAgainstCarelessClients.TestCase
TestCarelessClients.settings = settings(stateful_step_count=40, max_examples=150)


@pytest.mark.parametrize("extent_pages", [0, 16])
def test_a_block_comes_back_as_it_was_put(extent_pages: int) -> None:
    """The bytes and their checksum; a second put of it is told that it is there."""
    world = World(extent_pages=extent_pages)
    assert world.store("c0", {b"a": FRAME}) == ["stored"]
    assert world.has(b"a")
    assert world.store("c1", {b"a": FRAME}) == ["stored"]
    assert not world.has(b"b")


def test_nothing_is_lent_before_it_is_acknowledged() -> None:
    """Neither what is being written nor what is on its way to disk."""
    world = World(extent_pages=16)
    grant, _ = world.put("c0", {b"a": FRAME})
    world.write(grant)
    assert not world.has(b"a")
    delivery = world.deliver(grant)
    assert not world.has(b"a")
    world.acknowledge(delivery)
    assert world.has(b"a")


def test_asking_what_is_there_uses_and_holds_nothing() -> None:
    """Each block by itself, as soon as it could be lent and no sooner, gaps or not; a block that is
    asked about is the next to go all the same."""
    world = World(2)
    assert world.store("w", {b"a": FRAME}) == ["stored"]
    assert world.store("w", {b"b": FRAME}) == ["stored"]

    def held(*keys: bytes) -> tuple[bool, ...]:
        return world.shard.held(wire.Has(9, keys), world.now_s).held

    assert held(b"a", b"x", b"b") == (True, False, True)
    grant, _ = world.put("w", {b"c": FRAME})
    assert held(b"a", b"b", b"c") == (False, True, False)
    world.write(grant)
    world.finish(grant)
    assert held(b"b", b"c") == (True, True)
    assert not world.shard.holds("reader")


@pytest.mark.parametrize("told", [b"noise", b"another", b"nothing"])
def test_what_is_not_the_frame_that_was_told_is_refused(told: bytes) -> None:
    """Noise, another whole frame, and nothing at all; the memory is free again."""
    world = World()
    grant, _ = world.put("c0", {b"a": FRAME})
    if told == b"noise":
        world.write(grant, b"\xee")
    elif told == b"another":
        world.write(Grant("c0", 0, grant.keys, [frame_of(2, 1000)], grant.extents))
    (verdict,) = world.finish(grant)
    assert verdict == wire.Verdict(Outcome.REFUSED, Reason.DAMAGED)
    assert world.shard.stats(0).free_bytes == 8 * PAGE
    world.check()


def test_a_frame_of_another_codec_than_told_is_refused() -> None:
    """Bytes are counted by codec, and readers opt in by it."""
    assert World().store("c0", {b"a": FRAME}, codec="int8") == [Reason.DAMAGED]


def test_a_slow_writer_harms_nobody() -> None:
    """Its grant ends, its place is nobody's while it may still write, and comes back when it says
    that it is done."""
    world = World(n_pages=1)
    slow, _ = world.put("c0", {b"a": FRAME})
    world.now_s = TERMS.write_s
    assert world.store("c1", {b"b": FRAME}) == [Reason.NO_MEMORY]
    assert world.shard.stats(0).quarantined_bytes == len(FRAME)
    world.write(slow)
    assert [v.reason for v in world.finish(slow)] == [Reason.LATE]
    assert world.store("c1", {b"b": FRAME}) == ["stored"]
    assert not world.has(b"a")
    assert world.has(b"b")


def test_a_dead_writers_place_comes_back_once_its_bytes_have_settled() -> None:
    """Bytes on their way when its connection ended land in a place that is nobody's."""
    world = World(n_pages=1)
    dead, _ = world.put("c0", {b"a": FRAME})
    world.shard.gone("c0", world.now_s)
    assert world.store("c1", {b"b": FRAME}) == [Reason.NO_MEMORY]
    world.write(dead)
    world.now_s += TERMS.settle_s
    world.shard.advance(world.now_s)
    world.check()
    assert world.store("c1", {b"b": FRAME}) == ["stored"]


def test_a_dead_writers_key_is_free_at_once() -> None:
    """Another replica stores the block meanwhile."""
    world = World()
    world.put("c0", {b"a": FRAME})
    assert world.store("c1", {b"a": FRAME}) == ["c0/1 writes it"]
    world.shard.gone("c0", world.now_s)
    assert world.store("c1", {b"a": FRAME}) == ["stored"]
    world.now_s += TERMS.settle_s
    world.shard.advance(world.now_s)
    assert world.has(b"a")


def test_a_damaged_block_is_dropped_once_a_reader_says_so() -> None:
    """After a second look: a reader whose own memory is bad drops nothing."""
    world = World()
    world.store("c0", {b"a": FRAME, b"b": frame_of(2, 1000)})
    number, _ = world.lend("c0", [b"a", b"b"])
    places = world.shard._readings["c0", number].slots
    world.memory[places[0].extents[0].offset + 99] ^= 1
    assert world.shard.done("c0", wire.Done(number, (0, 1, 7)), world.now_s) == (b"a",)
    assert not world.has(b"a")
    assert world.has(b"b", frame_of(2, 1000))


def test_a_full_shard_evicts_what_was_used_least_recently() -> None:
    """And never what is being read."""
    world = World(n_pages=2)
    world.store("c0", {b"a": FRAME})
    world.store("c0", {b"b": FRAME})
    number, _ = world.lend("c1", [b"a"])
    assert world.store("c0", {b"c": FRAME}) == ["stored"]
    assert not world.has(b"b")
    world.shard.done("c1", wire.Done(number), world.now_s)
    assert world.has(b"a")
    world.lend("c1", [b"a"])
    world.lend("c1", [b"c"])
    assert world.store("c0", {b"d": FRAME}) == [Refusal.ALL_HELD]


def test_a_tenant_has_no_more_than_its_quota() -> None:
    """Its own blocks go for its own."""
    world = World(tenants={"small": 2 * PAGE})
    world.store("c0", {b"a": FRAME}, tenant="other")
    for key in (b"b", b"c", b"d"):
        assert world.store("c0", {key: FRAME}, tenant="small") == ["stored"]
    assert [world.has(key) for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    big = frame_of(3, 3 * PAGE)
    assert world.store("c0", {b"e": big}, tenant="small") == [Refusal.LARGER_THAN_QUOTA]


@pytest.mark.parametrize("extent_pages", [0, 16])
def test_forgetting_overwrites(extent_pages: int) -> None:
    """No byte of the tenant is left in memory; its puts under way are refused for a while."""
    world = World(extent_pages=extent_pages)
    secret = frame_of(0x5EC2E75EC2E7, 3000)
    world.store("c0", {b"a": secret}, tenant="t")
    world.store("c0", {b"b": FRAME}, tenant="u")
    late, _ = world.put("c0", {b"c": secret}, tenant="t")
    world.write(late)
    assert world.shard.forget(["t"], world.now_s) == (2, len(secret))
    world.obey()
    assert [v.reason for v in world.finish(late)] == [Reason.LATE]
    assert secret[64:72] not in bytes(world.memory)
    assert b"a" not in world.disk
    assert world.store("c0", {b"a": secret}, tenant="t") == [Reason.FORGOTTEN]
    assert world.has(b"b")
    world.now_s = 61.0
    assert world.store("c0", {b"a": secret}, tenant="t") == ["stored"]


def test_forgetting_while_a_block_is_made_durable() -> None:
    """It is not acknowledged, and leaves the disk again."""
    world = World(extent_pages=16)
    grant, _ = world.put("c0", {b"a": FRAME})
    world.write(grant)
    delivery = world.deliver(grant)
    frames = world.shard.frames(delivery, 1e9)
    world.shard.forget(["t"], world.now_s)
    assert world.shard.frames(delivery, 1e9) == []
    world.disk.update((key, (note, bytes(frame))) for key, note, frame in frames)
    (verdict,) = world.shard.acknowledge(delivery, {b"a"}, world.now_s).verdicts
    world.obey()
    assert verdict.reason == Reason.LATE
    assert not world.disk
    world.check()


def test_more_fits_on_disk_than_in_memory() -> None:
    """What is not in memory is loaded for whoever asks, and is exact."""
    world = World(n_pages=2, extent_pages=32)
    frames = {bytes([65 + at]): frame_of(at + 1, 3000) for at in range(8)}
    for key, frame in frames.items():
        assert world.store("c0", {key: frame}) == ["stored"]
    assert all(world.has(key, frame) for key, frame in frames.items())
    number, lent = world.lend("c1", list(frames))
    assert [frame for _, frame in lent] == list(frames.values())[:2]
    world.shard.done("c1", wire.Done(number), world.now_s)
    world.check()


def test_a_block_that_the_disk_lost_is_a_miss() -> None:
    """And stays one."""
    world = World(n_pages=1, extent_pages=32)
    world.store("c0", {b"a": FRAME})
    world.store("c0", {b"b": FRAME})
    del world.disk[b"a"]
    assert not world.has(b"a")
    assert world.has(b"b")


@pytest.mark.parametrize("why", ["unknown", "being written", "lost by the disk"])
def test_who_is_lent_nothing_holds_nothing(why: str) -> None:
    """No lease is left to its time: a client says that it is done only with what it was lent."""
    world = World(n_pages=2, extent_pages=32)
    if why == "being written":
        world.put("c0", {b"a": FRAME})
    elif why == "lost by the disk":
        for key in (b"a", b"b", b"c"):
            world.store("c0", {key: FRAME})
        del world.disk[b"a"]
    _, lent = world.lend("reader", [b"a", b"b"])
    assert not lent
    assert world.shard.stats(0).leases == 0
    assert not world.shard.holds("reader")


def test_a_full_disk_refuses() -> None:
    """Nothing is acknowledged that would not survive."""
    world = World(extent_pages=32)
    grant, _ = world.put("c0", {b"a": FRAME})
    world.write(grant)
    verdicts = world.acknowledge(world.deliver(grant), fails=True)
    assert [v.reason for v in verdicts] == [Reason.DISK]
    assert world.store("c0", {b"a": FRAME}) == ["stored"]


def test_a_restarted_shard_has_what_it_acknowledged() -> None:
    """What has expired meanwhile, and what cannot be understood, is deleted."""
    old = World(extent_pages=32)
    old.store("c0", {b"a": FRAME})
    old.store("c0", {b"b": FRAME}, ttl_s=5.0)
    new = World(extent_pages=32)
    new.disk = {**old.disk, b"c": (b"\xc1", FRAME)}
    notes = [(key, note, len(frame)) for key, (note, frame) in new.disk.items()]
    new.now_s = 1000.0
    assert new.shard.restore(notes, 1e9 + 5.0, new.now_s) == 1
    new.obey()
    assert list(new.disk) == [b"a"]
    assert new.has(b"a")


def test_a_number_used_twice_and_a_key_named_twice_grant_once() -> None:
    """A confused client gets no second place for the same bytes."""
    world = World()
    offer = wire.Offer(b"a", None, 1000, 1.0)
    put = wire.Put(1, "t", "raw", (offer, offer))
    first = world.shard.grant("c0", put, 0.0).verdicts
    assert [v.outcome for v in first] == [Outcome.WRITE, Outcome.BUSY]
    again = world.shard.grant("c0", put, 0.0).verdicts
    assert {v.reason for v in again} == {Reason.MALFORMED}
    itself = wire.Put(2, "t", "raw", (wire.Offer(b"b", b"b", 1000, 1.0),))
    assert world.shard.grant("c0", itself, 0.0).verdicts[0].reason == Reason.MALFORMED
    world.check()


def test_more_than_the_memory_is_refused_at_start() -> None:
    """Without a disk the books must not promise what the memory cannot hold."""
    with pytest.raises(VaultError, match="disk extent"):
        Shard(memoryview(bytearray(PAGE)), Quotas(2 * PAGE), Lru())
