"""What a vault shard keeps, for whom and for how long."""

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv.errors import VaultError
from kv.eviction import Lru, Policy, ValueDensity
from kv.vault.ends import Ends
from kv.vault.ledger import Ledger
from kv.vault.orders import Cause, Outcome, Put, Quotas, Refusal, Removed, Verdict

# A tree of three chains that share their first block, twice: tenant a's and tenant b's.
TREES = {
    tenant: {
        f"{tenant}{chain}{depth}".encode(): (
            f"{tenant}{chain if depth > 1 else 0}{depth - 1}".encode() if depth else None
        )
        for chain in range(3)
        for depth in range(0 if chain == 0 else 1, 4)
    }
    for tenant in "ab"
}
KEYS = [key for tree in TREES.values() for key in tree]
PARENTS = {key: parent for tree in TREES.values() for key, parent in tree.items()}


def path_of(key: bytes) -> list[bytes]:
    path = []
    at: bytes | None = key
    while at is not None:
        path.append(at)
        at = PARENTS[at]
    return path[::-1]


def put(
    key: bytes,
    n_bytes: int = 1,
    *,
    writer: str = "w0",
    ttl_s: float = inf,
    seconds_saved: float = 1.0,
    parent: bytes | None = None,
) -> Put:
    return Put(key, parent or PARENTS.get(key), chr(key[0]), writer, n_bytes, seconds_saved, ttl_s)


def store(ledger: Ledger, key: bytes, now_s: float = 0.0, **kwargs: object) -> Verdict:
    verdict = ledger.begin(put(key, **kwargs), now_s)  # type: ignore[arg-type]
    if verdict.outcome is Outcome.WRITE:
        assert ledger.complete(key, "w0", now_s)
    return verdict


def shard(total_bytes: int = 10, policy: Policy | None = None, **tenants: int) -> Ledger:
    return Ledger(Quotas(total_bytes, tenants), policy or Lru())


some_key = st.sampled_from(KEYS)
some_owner = st.sampled_from(["r0", "r1"])
some_writer = st.sampled_from(["w0", "w1"])


class LedgerAgainstIntents(RuleBasedStateMachine):
    """Whatever is asked in whatever order: the books balance, every removal is told exactly once,
    what is held stays, and what was forgotten or not acknowledged is never read."""

    @initialize(value=st.booleans(), total=st.integers(3, 12), own=st.integers(1, 12))
    def start(self, value: bool, total: int, own: int) -> None:
        policy = ValueDensity() if value else Lru()
        self.ledger = Ledger(Quotas(total, {"a": own}), policy)
        self.total, self.own = total, own
        self.now_s = 0.0
        self.bytes: dict[bytes, int] = {}  # of every block whose bytes are somewhere
        self.acknowledged: set[bytes] = set()
        self.leases: dict[tuple[str, bytes], float] = {}
        self.pins: dict[str, set[bytes]] = {"r0": set(), "r1": set()}

    def obey(self, removed: tuple[Removed, ...]) -> None:
        for each in removed:
            assert self.bytes.pop(each.key) == each.n_bytes
            self.acknowledged.discard(each.key)
            readers = [end for (_, key), end in self.leases.items() if key == each.key]
            assert not [end for end in readers if end > self.now_s]
            pinned = any(each.key in keys for keys in self.pins.values())
            assert not pinned or each.cause in (Cause.FORGOTTEN, Cause.DROPPED)
            if each.cause in (Cause.QUOTA, Cause.SPACE):
                kept = self.bytes.keys() & self.acknowledged
                children = {key for key in kept if PARENTS[key] == each.key}
                assert not {key for key in children if key in self.ledger._entries}

    @rule(
        key=some_key,
        writer=some_writer,
        n_bytes=st.integers(1, 4),
        cost=st.floats(0, 9),
        ttl_s=st.sampled_from([inf, 5.0, 50.0]),
        finish=st.sampled_from(["complete", "abort", "leave"]),
    )
    def put(
        self, key: bytes, writer: str, n_bytes: int, cost: float, ttl_s: float, finish: str
    ) -> None:
        before = len(self.ledger)
        verdict = self.ledger.begin(
            put(key, n_bytes, writer=writer, ttl_s=ttl_s, seconds_saved=cost), self.now_s
        )
        self.obey(verdict.removed)
        if verdict.outcome is Outcome.REFUSED:
            assert verdict.refusal is not None
            assert {each.cause for each in verdict.removed} <= {Cause.WRITE_ENDED, Cause.EXPIRED}
            assert len(self.ledger) == before - len(verdict.removed)
        if verdict.outcome is not Outcome.WRITE:
            return
        self.bytes.setdefault(key, n_bytes)
        if finish == "complete":
            assert self.ledger.complete(key, writer, self.now_s)
            self.acknowledged.add(key)
        elif finish == "abort":
            self.obey(self.ledger.abort(key, writer, self.now_s))
            assert key not in self.bytes

    @rule(key=some_key, writer=some_writer)
    def complete_late(self, key: bytes, writer: str) -> None:
        if self.ledger.complete(key, writer, self.now_s):
            self.acknowledged.add(key)

    @rule(key=some_key, owner=some_owner, for_s=st.sampled_from([0.0, 3.0, 40.0]))
    def lease(self, key: bytes, owner: str, for_s: float) -> None:
        path = path_of(key)
        depth = self.ledger.depth(path, self.now_s)
        lent = self.ledger.lease(path, owner, self.now_s + for_s, self.now_s)
        assert lent.depth == depth
        self.obey(lent.removed)
        assert set(path[:depth]) <= self.acknowledged
        for held in path[:depth]:
            known_s = self.leases.get((owner, held), -inf)
            self.leases[owner, held] = max(known_s, self.now_s + for_s)

    @rule(owner=some_owner)
    def release(self, owner: str) -> None:
        for held in [each for each in self.leases if each[0] == owner]:
            del self.leases[held]
        self.obey(self.ledger.release(owner, self.now_s))

    @rule(key=some_key, owner=some_owner)
    def pin(self, key: bytes, owner: str) -> None:
        path = path_of(key)
        pinned = self.ledger.pin(path, owner, self.now_s)
        self.pins[owner] |= set(path[: pinned.depth])
        self.obey(pinned.removed)

    @rule(owner=some_owner)
    def unpin(self, owner: str) -> None:
        self.pins[owner] = set()
        self.obey(self.ledger.unpin(owner, self.now_s))

    @rule(key=some_key)
    def drop(self, key: bytes) -> None:
        self.lose({key})
        self.obey(self.ledger.drop([key], self.now_s))
        assert self.ledger.depth([key], self.now_s) == 0

    @rule(tenant=st.sampled_from("ab"))
    def forget(self, tenant: str) -> None:
        mine = set(TREES[tenant])
        self.lose(mine)
        self.obey(self.ledger.forget(tenant, self.now_s))
        assert not [key for key in mine if self.ledger.depth([key], self.now_s)]
        if not [key for owner, key in self.leases if key in mine]:
            assert self.ledger.tenant_bytes(tenant) == 0

    def lose(self, keys: set[bytes]) -> None:
        self.acknowledged -= keys
        for pins in self.pins.values():
            pins -= keys

    @rule(for_s=st.sampled_from([0.5, 4.0, 35.0]))
    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        for held in [each for each, end_s in self.leases.items() if end_s <= self.now_s]:
            del self.leases[held]
        self.obey(self.ledger.advance(self.now_s))

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        assert sum(self.bytes.values()) == self.ledger.n_bytes <= self.total
        assert self.ledger.tenant_bytes("a") <= self.own
        for owner, pinned in self.pins.items():
            assert self.ledger.depth(sorted(pinned), self.now_s) == len(pinned), owner
        for key in self.acknowledged:
            assert key in self.bytes

    def teardown(self) -> None:
        """All holders gone and both tenants forgotten, nothing is left."""
        if hasattr(self, "ledger"):
            for owner in ("r0", "r1"):
                self.release(owner)
            self.forget("a")
            self.forget("b")
            assert self.ledger.n_bytes == 0
            assert not self.bytes


TestLedgerAgainstIntents = LedgerAgainstIntents.TestCase
TestLedgerAgainstIntents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_second_replica_does_not_store_a_block_twice() -> None:
    """While one writes the other is told so; afterwards it is stored, and charged once."""
    ledger = shard()
    assert ledger.begin(put(b"a00", writer="w0"), 0.0).outcome is Outcome.WRITE
    assert ledger.begin(put(b"a00", writer="w1"), 0.0).outcome is Outcome.BUSY
    assert not ledger.complete(b"a00", "w1", 0.0)
    assert ledger.complete(b"a00", "w0", 0.0)
    assert ledger.begin(put(b"a00", writer="w1"), 0.0).outcome is Outcome.STORED
    assert ledger.n_bytes == 1


def test_a_writer_that_lost_the_answer_may_ask_again() -> None:
    """The reservation is its own still, and not made twice."""
    ledger = shard()
    for _ in range(2):
        assert ledger.begin(put(b"a00"), 0.0).outcome is Outcome.WRITE
    assert ledger.n_bytes == 1


def test_what_is_not_acknowledged_cannot_be_read() -> None:
    """Neither before the bytes are there nor after the writer has died."""
    ledger = Ledger(Quotas(4), Lru(), write_s=30.0)
    ledger.begin(put(b"a00"), 0.0)
    assert ledger.depth([b"a00"], 29.0) == 0
    assert ledger.advance(30.0) == (Removed(b"a00", 1, Cause.WRITE_ENDED),)
    assert not ledger.complete(b"a00", "w0", 31.0)
    assert ledger.n_bytes == 0


def test_a_parent_outlives_its_children() -> None:
    """The oldest block stays while others lie behind it, and goes as the last of its chain."""
    ledger = shard(3)
    for at_s, key in enumerate([b"a00", b"a01", b"a02"]):
        store(ledger, key, at_s)
    gone = []
    for at_s, key in enumerate([b"b00", b"b01", b"b02"], start=10):
        gone += [each.key for each in store(ledger, key, at_s).removed]
    assert gone == [b"a02", b"a01", b"a00"]


def test_the_block_before_a_new_one_does_not_go_for_it() -> None:
    """A shard of one chain refuses its next block rather than cut the chain above it."""
    ledger = shard(2)
    store(ledger, b"a00")
    store(ledger, b"a01")
    verdict = store(ledger, b"a02")
    assert (verdict.outcome, verdict.refusal) == (Outcome.REFUSED, Refusal.ALL_HELD)
    assert "2 of 2 bytes" in verdict.detail
    assert ledger.depth([b"a00", b"a01"], 0.0) == 2


def test_a_child_may_come_before_its_parent() -> None:
    """Writers race: the parent is no leaf from the moment it comes."""
    ledger = shard(2)
    store(ledger, b"a01", 0.0)
    store(ledger, b"a00", 1.0)
    assert [each.key for each in store(ledger, b"b00", 2.0).removed] == [b"a01"]


def test_a_full_tenant_evicts_its_own() -> None:
    """Others keep theirs, though older."""
    ledger = shard(10, a=2)
    store(ledger, b"b00", 0.0)
    store(ledger, b"a00", 1.0)
    store(ledger, b"a01", 2.0)
    verdict = ledger.begin(put(b"a11", parent=b"a00"), 3.0)
    assert verdict.removed == (Removed(b"a01", 1, Cause.QUOTA),)


def test_a_full_shard_evicts_anybodys() -> None:
    """The cause says that it was for space."""
    ledger = shard(2)
    store(ledger, b"b00", 0.0)
    store(ledger, b"a00", 1.0)
    assert store(ledger, b"a01", 2.0).removed == (Removed(b"b00", 1, Cause.SPACE),)


def test_a_block_larger_than_the_quota_is_refused_with_the_numbers() -> None:
    """Nothing is evicted for what can never fit."""
    ledger = shard(10, a=2)
    store(ledger, b"a00")
    verdict = ledger.begin(put(b"a01", n_bytes=3), 0.0)
    assert verdict.refusal is Refusal.LARGER_THAN_QUOTA
    assert verdict.detail == "3 bytes, 2 for a"
    assert verdict.removed == ()


def test_a_quota_full_of_pins_refuses_and_evicts_nothing() -> None:
    """Even what could have gone stays, since it would not have been enough."""
    ledger = shard(10, a=3)
    store(ledger, b"a00", n_bytes=2)
    ledger.pin([b"a00"], "artifact", 0.0)
    store(ledger, b"a11", parent=b"b99", n_bytes=1)
    verdict = ledger.begin(put(b"a21", n_bytes=2, parent=b"b99"), 1.0)
    assert verdict.refusal is Refusal.TENANT_HELD
    assert verdict.removed == ()
    assert ledger.depth([b"a11"], 1.0) == 1
    ledger.check_integrity()


def test_a_pin_outlives_time_and_pressure_until_it_is_released() -> None:
    """Then what has expired meanwhile goes at once."""
    ledger = shard(1)
    store(ledger, b"a00", ttl_s=5.0)
    ledger.pin([b"a00"], "artifact", 0.0)
    assert store(ledger, b"b00", 9.0).refusal is Refusal.ALL_HELD
    assert ledger.depth([b"a00"], 9.0) == 1
    assert ledger.unpin("artifact", 10.0) == (Removed(b"a00", 1, Cause.EXPIRED),)


def test_a_lease_ends_by_itself() -> None:
    """A reader that died holds nothing for longer than it said."""
    ledger = shard(1)
    store(ledger, b"a00")
    ledger.lease([b"a00"], "r0", 10.0, 0.0)
    assert store(ledger, b"b00", 9.9).refusal is Refusal.ALL_HELD
    assert store(ledger, b"b00", 10.0).outcome is Outcome.WRITE


def test_time_to_live_ends_a_block_and_a_new_put_renews_it() -> None:
    """Reading does not."""
    ledger = shard()
    store(ledger, b"a00", 0.0, ttl_s=10.0)
    store(ledger, b"a00", 5.0, ttl_s=10.0)
    ledger.lease([b"a00"], "r0", 9.0, 9.0)
    assert ledger.depth([b"a00"], 14.9) == 1
    assert ledger.advance(15.0) == (Removed(b"a00", 1, Cause.EXPIRED),)


@pytest.mark.parametrize("how", ["forget", "drop", "expire"])
def test_bytes_that_are_being_read_outlive_their_name(how: str) -> None:
    """No new reader finds the block; its bytes count, and are freed when the last reader ends."""
    ledger = shard(1)
    store(ledger, b"a00", ttl_s=5.0)
    ledger.lease([b"a00"], "r0", 60.0, 0.0)
    ends = {
        "forget": lambda: ledger.forget("a", 6.0),
        "drop": lambda: ledger.drop([b"a00"], 6.0),
        "expire": lambda: ledger.advance(6.0),
    }
    assert ends[how]() == ()
    assert ledger.depth([b"a00"], 6.0) == 0
    assert ledger.n_bytes == 1
    assert ledger.begin(put(b"a00"), 6.0).outcome is Outcome.BUSY
    ledger.check_integrity()
    assert [each.key for each in ledger.release("r0", 7.0)] == [b"a00"]
    assert ledger.n_bytes == 0


def test_a_forgotten_tenant_leaves_no_memory_of_its_blocks() -> None:
    """Not even of those that were evicted before; pins and writes do not save a block."""
    ledger = shard(2)
    store(ledger, b"a00", 0.0)
    store(ledger, b"b00", 1.0)
    store(ledger, b"b11", 2.0, parent=b"b00")
    assert ledger._past.recall("a", b"a00") == (0, 0)
    ledger.pin([b"b00"], "artifact", 3.0)
    ledger.forget("a", 3.0)
    ledger.forget("b", 3.0)
    assert ledger._past._known == {}
    assert len(ledger) == ledger.n_bytes == 0
    ledger.check_integrity()


def test_a_block_that_comes_back_keeps_its_history() -> None:
    """It was asked for again, though it was not there."""
    ledger = shard(1)
    store(ledger, b"a00", 0.0)
    store(ledger, b"b00", 1.0)
    store(ledger, b"a00", 2.0)
    assert ledger._entries[b"a00"].hits == 1


def test_worth_less_than_all_that_is_stored_is_not_stored() -> None:
    """By value density a cheap block does not displace a dear one."""
    ledger = shard(1, ValueDensity())
    store(ledger, b"a00", seconds_saved=9.0)
    assert store(ledger, b"b00", seconds_saved=1.0).refusal is Refusal.WORTH_LESS
    assert store(ledger, b"b00", seconds_saved=10.0).outcome is Outcome.WRITE


def test_a_clock_that_goes_back_changes_nothing() -> None:
    """The latest time counts."""
    ledger = shard()
    store(ledger, b"a00", 10.0, ttl_s=5.0)
    ledger.advance(14.0)
    assert store(ledger, b"b00", 3.0, ttl_s=5.0).outcome is Outcome.WRITE
    assert len(ledger.advance(15.0)) == 1
    with pytest.raises(VaultError, match="clock"):
        ledger.advance(float("nan"))


def test_ends_of_blocks_that_went_earlier_do_not_pile_up() -> None:
    """A day's time to live under steady eviction takes no more memory than what is stored."""
    ledger = shard(4)
    for at in range(5_000):
        store(ledger, b"a" + at.to_bytes(4, "big"), at * 1e-3, ttl_s=86_400.0)
    assert len(ledger._ends) <= 300
    ledger.check_integrity()


def test_looking_for_ends_that_passed_costs_each_put_a_constant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many blocks are stored without an end of their own."""
    looked = 0
    rewatch = Ends._rewatch

    def counted(ends: Ends) -> None:
        nonlocal looked
        looked += len(ends._there())
        rewatch(ends)

    monkeypatch.setattr(Ends, "_rewatch", counted)
    ledger = shard(8_000)
    for at in range(8_000):
        store(ledger, b"a" + at.to_bytes(4, "big"), at * 1e-6)
    assert looked <= 3 * 8_000


def test_a_recount_finds_a_wrong_book() -> None:
    """The check is a real one: each book put wrong is found."""
    wrongs = [
        lambda ledger: ledger._bytes.update(a=1),
        lambda ledger: ledger._children.update({b"a00": 1}),
        lambda ledger: ledger._leaves.withdraw(b"a01"),
        lambda ledger: ledger._entries[b"a00"].leases.update(r9=99.0),
        lambda ledger: ledger._keys["a"].discard(b"a00"),
        lambda ledger: ledger._ends.clear(),
    ]
    for wrong in wrongs:
        ledger = shard()
        store(ledger, b"a00", ttl_s=9.0)
        store(ledger, b"a01", ttl_s=9.0)
        ledger.check_integrity()
        wrong(ledger)
        with pytest.raises(VaultError, match="counted"):
            ledger.check_integrity()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_bytes": 0},
        {"seconds_saved": -1.0},
        {"seconds_saved": float("nan")},
        {"ttl_s": 0.0},
        {"parent": b"a00"},
    ],
)
def test_a_put_that_makes_no_sense_is_an_error(wrong: dict) -> None:
    """It would break the ranks or the tree."""
    with pytest.raises(VaultError, match="put of"):
        put(b"a00", **wrong)


@pytest.mark.parametrize("wrong", [(0, {}), (5, {"a": 0}), (5, {}, 0)])
def test_a_quota_of_nothing_is_an_error(wrong: tuple) -> None:
    """A tenant that may store nothing is left out by whoever writes."""
    with pytest.raises(VaultError, match="quotas"):
        Quotas(*wrong)
