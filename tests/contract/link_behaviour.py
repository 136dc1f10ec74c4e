"""What a replica does at the other end of a `Link`: run on the simulator and on real engines.

Plain functions over a `Stage`; `BEHAVIOURS` lists them. Each waits at most `Stage.patience_s` for
something to become true, so that they hold on virtual and on real time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from kv.block import TOKEN_BYTES, split_keys
from kv.catalogue import Tier
from kv.plan import Hints
from kv.salt import UNTAGGED
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    Forget,
    Forgotten,
    Inbox,
    Keep,
    Link,
    Load,
    Release,
    Replica,
    Reply,
    Resync,
    Role,
    Spent,
    Step,
    Submit,
    Welcome,
    Yielding,
)

Connect = Callable[[Inbox], Link]


@dataclass(frozen=True, slots=True)
class Stage:
    """One prefill and one decode replica, both idle and with an empty cache for these prompts.

    `prompt(i)` gives packed tokens of at least three blocks, different for each i; `body(n)` asks
    for n greedy tokens whatever they are, `salted(n, salt)` for the same under a salt.
    """

    prefill: Connect
    decode: Connect
    prompt: Callable[[int], bytes]
    body: Callable[[int], bytes]
    salted: Callable[[int, str], bytes]
    block_tokens: int = 16
    patience_s: float = 20.0


@dataclass(slots=True)
class Recorder:
    """An inbox that keeps all that it is told."""

    replies: list[Reply] = field(default_factory=list)

    def receive(self, reply: Reply) -> None:
        self.replies.append(reply)

    def deltas(self, request_id: str) -> list[Delta]:
        steps = [reply for reply in self.replies if isinstance(reply, Step)]
        return [d for step in steps for d in step.deltas if d.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas(request_id) for token in delta.token_ids]

    def finished(self, request_id: str) -> bool:
        return any(delta.finish_reason is not None for delta in self.deltas(request_id))

    def blocks(self) -> list[Blocks]:
        return [reply for reply in self.replies if isinstance(reply, Blocks)]

    def replica(self) -> Replica:
        welcomes = [reply for reply in self.replies if isinstance(reply, Welcome)]
        return welcomes[-1].replica

    @property
    def load(self) -> Load:
        """The last load told; a busy one before the first."""
        loads = [reply for reply in self.replies if isinstance(reply, Load)]
        return loads[-1] if loads else Load(waiting=1)


class Side:
    """A connection to one replica, and what came over it."""

    def __init__(self, stage: Stage, connect: Connect) -> None:
        self._stage = stage
        self.heard = Recorder()
        self.link = connect(self.heard)

    @property
    def replica(self) -> Replica:
        return self.heard.replica()

    async def until(self, true: Callable[[], bool], what: str) -> None:
        began = asyncio.get_running_loop().time()
        while not true():
            waited_s = asyncio.get_running_loop().time() - began
            assert waited_s < self._stage.patience_s, f"{what}: not within {waited_s:.1f} s"
            await asyncio.sleep(0.01)

    async def followed(self) -> None:
        await self.until(lambda: bool(self.heard.blocks()), "a snapshot of the blocks")

    async def run(self, submit: Submit) -> list[Delta]:
        """All deltas of one request."""
        self.link.send(submit)
        await self.until(lambda: self.heard.finished(submit.request_id), submit.request_id)
        return self.heard.deltas(submit.request_id)

    async def hit(self, name: str, tokens: bytes, body: bytes) -> int:
        """Prompt tokens that this replica neither computed nor received for a new request."""
        sources = (await self.run(Submit(name, Role.DECODE, tokens, body)))[0].sources
        assert sources is not None
        return sources.device_tokens

    def order(self, tags: tuple[str, ...]) -> str:
        """Have tags forgotten; the order's name."""
        order_id = f"order {len(self.heard.replies)}"
        self.link.send(Forget(order_id, tags))
        return order_id

    async def forgotten(self, order_id: str) -> Forgotten:
        """The answer to an order."""

        def answers() -> list[Forgotten]:
            told = [reply for reply in self.heard.replies if isinstance(reply, Forgotten)]
            return [answer for answer in told if answer.order_id == order_id]

        await self.until(lambda: bool(answers()), order_id)
        return answers()[0]

    async def forget(self, tags: tuple[str, ...]) -> Forgotten:
        return await self.forgotten(self.order(tags))

    async def load(self, true: Callable[[Load], bool], what: str) -> None:
        await self.until(lambda: true(self.heard.load), what)


async def _sides(stage: Stage) -> tuple[Side, Side]:
    prefill, decode = Side(stage, stage.prefill), Side(stage, stage.decode)
    await prefill.followed()
    await decode.followed()
    return prefill, decode


async def it_welcomes_first(stage: Stage) -> None:
    """Welcome, Load and a snapshot come first; a second Hello gets no second Welcome."""
    side = Side(stage, stage.decode)
    await side.followed()
    welcome, load, blocks = side.heard.replies[:3]
    assert isinstance(welcome, Welcome)
    assert isinstance(load, Load)
    assert isinstance(blocks, Blocks)
    assert blocks.snapshot
    await asyncio.sleep(2.5)  # links say Hello every second
    assert sum(isinstance(reply, Welcome) for reply in side.heard.replies) == 1
    side.link.close()


async def a_handoff_gives_the_same_tokens(stage: Stage) -> None:
    """A prefill answers one token, sources and a handoff under a lease; a decode behind it gives
    the tokens that one without it gives, and ends the lease."""
    prefill, decode = await _sides(stage)
    tokens = stage.prompt(0)
    n_tokens = len(tokens) // TOKEN_BYTES
    first = (await prefill.run(Submit("p0", Role.PREFILL, tokens, stage.body(6))))[-1]
    assert first.finish_reason == "length"
    assert len(first.token_ids) == 1
    assert first.handoff is not None
    assert first.sources is not None
    assert first.sources.prompt_tokens == n_tokens
    assert first.sources.computed_tokens + first.sources.device_tokens == n_tokens
    await prefill.load(lambda load: load.leased == 1, "a lease")
    ask = Submit("d0", Role.DECODE, tokens, stage.body(6), first.handoff)
    sources = (await decode.run(ask))[0].sources
    assert sources is not None
    assert sources.received_tokens > 0
    await prefill.load(lambda load: load.leased == 0, "the lease to end")
    await decode.run(Submit("d1", Role.DECODE, tokens, stage.body(6)))
    assert len(decode.heard.tokens("d0")) == 6
    assert decode.heard.tokens("d0") == decode.heard.tokens("d1")
    await _close(prefill, decode)


async def the_first_delta_tells_the_seconds(stage: Stage) -> None:
    """Each side says once what a request spent: P computed, D loaded what P handed off. Neither
    says more than passed, and all bytes of what was received are counted."""
    prefill, decode = await _sides(stage)
    tokens = stage.prompt(13)
    began = asyncio.get_running_loop().time()
    first = (await prefill.run(Submit("t0", Role.PREFILL, tokens, stage.body(4))))[-1]
    ask = Submit("t1", Role.DECODE, tokens, stage.body(4), first.handoff)
    second, *others = await decode.run(ask)
    passed_s = asyncio.get_running_loop().time() - began
    assert [delta.spent for delta in others] == [None] * len(others)
    spent, loaded = first.spent, second.spent
    assert spent is not None
    assert loaded is not None
    assert second.sources is not None
    assert (spent.loading_s, spent.loaded_bytes, spent.others_tokens) == (0.0, 0, 0)
    assert spent.computing_s > 0.0
    token_bytes = decode.replica.kv_bytes_per_token
    assert loaded.loaded_bytes == second.sources.received_tokens * token_bytes > 0
    assert loaded.loading_s > 0.0
    assert loaded.others_tokens == 0
    assert all(seconds >= 0.0 for seconds in _seconds(spent, loaded))
    assert sum(_seconds(spent, loaded)) <= passed_s
    await _close(prefill, decode)


async def waiting_is_told_apart_from_computing(stage: Stage) -> None:
    """Of many prompts that come at once the last is taken up behind others, or computed beside
    them: it says how long it waited, or how much of theirs was computed meanwhile."""
    prefill, decode = await _sides(stage)
    asks = [
        Submit(f"w{number}", Role.PREFILL, stage.prompt(20 + number), stage.body(1))
        for number in range(6)
    ]
    for ask in asks:
        prefill.link.send(ask)
    await prefill.until(
        lambda: all(prefill.heard.finished(ask.request_id) for ask in asks), "all six"
    )
    last = prefill.heard.deltas("w5")[-1].spent
    assert last is not None
    assert last.queued_s > last.computing_s or last.others_tokens > 0
    for ask in asks:
        handoff = prefill.heard.deltas(ask.request_id)[-1].handoff
        assert handoff is not None
        decode.link.send(Release(f"{ask.request_id}.release", handoff))
    await _close(prefill, decode)


async def a_prefill_that_lends_keeps_no_lease(stage: Stage) -> None:
    """A split's head: one token and sources, no handoff, and nothing that somebody has to end."""
    prefill, decode = await _sides(stage)
    await prefill.load(_idle, "nothing that was leased before")
    known = len(prefill.heard.replies)
    ask = Submit("h0", Role.PREFILL, stage.prompt(13), stage.body(6), lends=True)
    last = (await prefill.run(ask))[-1]
    assert last.finish_reason == "length"
    assert len(last.token_ids) == 1
    assert last.handoff is None
    assert last.sources is not None
    assert last.sources.computed_tokens == len(ask.tokens) // TOKEN_BYTES

    def told() -> list[Load]:
        return [reply for reply in prefill.heard.replies[known:] if isinstance(reply, Load)]

    await prefill.until(lambda: bool(told()), "a load since then")
    await _close(prefill, decode)
    assert not any(load.leased for load in told())


async def an_abort_frees(stage: Stage) -> None:
    """An aborted stream says no more and frees its pages."""
    _, decode = sides = await _sides(stage)
    decode.link.send(Submit("a0", Role.DECODE, stage.prompt(1), stage.body(1000)))
    # A load from before it ran would look idle.
    await decode.load(lambda load: load.running == 1, "a running request")
    decode.link.send(Abort(["a0"]))
    await decode.load(_idle, "an idle replica")
    said = len(decode.heard.tokens("a0"))
    assert said < 1000
    await asyncio.sleep(0.5)
    assert len(decode.heard.tokens("a0")) == said
    await _close(*sides)


async def a_release_ends_the_lease(stage: Stage) -> None:
    """Release, sent to the decode replica, frees what the prefill replica kept."""
    prefill, decode = await _sides(stage)
    ask = Submit("r0", Role.PREFILL, stage.prompt(2), stage.body(1))
    handoff = (await prefill.run(ask))[-1].handoff
    assert handoff is not None
    await prefill.load(lambda load: load.leased == 1, "a lease")
    decode.link.send(Release("r0.release", handoff))
    await prefill.load(lambda load: load.leased == 0, "the lease to end")
    await _close(prefill, decode)


async def an_abort_before_the_read_ends_the_lease(stage: Stage) -> None:
    """A decode that is aborted as soon as it was sent leaves no lease behind."""
    prefill, decode = await _sides(stage)
    tokens = stage.prompt(3)
    handoff = (await prefill.run(Submit("b0", Role.PREFILL, tokens, stage.body(1))))[-1].handoff
    await prefill.load(lambda load: load.leased == 1, "a lease")
    decode.link.send(Submit("b1", Role.DECODE, tokens, stage.body(100), handoff))
    decode.link.send(Abort(["b1"]))
    await prefill.load(lambda load: load.leased == 0, "the lease to end")
    await _close(prefill, decode)


async def blocks_have_no_gaps(stage: Stage) -> None:
    """Block changes are numbered without gaps, whatever tier they are of, and add up to what a
    fresh snapshot says of each."""
    prefill, decode = await _sides(stage)
    for number in range(4, 7):
        ask = Submit(f"k{number}", Role.DECODE, stage.prompt(number), stage.body(2))
        await decode.run(ask)
    await decode.load(_idle, "an idle replica")
    follower = Side(stage, stage.decode)
    await follower.followed()
    await decode.until(
        lambda: _held(decode.heard.blocks()) == _held(follower.heard.blocks()), "the same blocks"
    )
    told = decode.heard.blocks()
    assert told[0].snapshot
    first = told[0].sequence
    assert [b.sequence for b in told] == list(range(first, first + len(told)))
    assert len(told) > 1
    decode.link.send(Resync())
    await decode.until(lambda: len(decode.heard.blocks()) > len(told), "a snapshot on request")
    again = decode.heard.blocks()[len(told)]
    assert (again.snapshot, again.sequence) == (True, told[-1].sequence)
    await decode.until(
        lambda: _held(decode.heard.blocks()[len(told) :]) == _held(told), "the same blocks again"
    )
    follower.link.close()
    await _close(prefill, decode)


async def load_is_zero_when_idle(stage: Stage) -> None:
    """Requests show in the load while they run, and not afterwards."""
    _, decode = sides = await _sides(stage)
    decode.link.send(Submit("l0", Role.DECODE, stage.prompt(7), stage.body(400)))
    await decode.load(lambda load: load.running == 1, "a running request")
    await decode.until(lambda: decode.heard.finished("l0"), "l0")
    assert len(decode.heard.tokens("l0")) == 400
    await decode.load(_idle, "an idle replica")
    assert decode.heard.load.kv_usage == 0.0
    assert decode.heard.load.totals.generated_tokens >= 400
    await _close(*sides)


# As `kv.salt.tagged` makes them: one tenant with two salts, and another.
_ACME, _ACME_OWN, _OTHER = "aa.11", "aa.22", "bb.33"
_FORGET_ACME = ("aa",)


async def forgetting_erases_one_tenant_only(stage: Stage) -> None:
    """After Forget every prompt of the tenant is computed anew, under whatever salt; another
    tenant's still hits. The blocks are told as removed before the answer comes, and the answer
    counts them."""
    _, decode = sides = await _sides(stage)
    tokens = stage.prompt(8)
    for name, salt in enumerate((_ACME, _ACME_OWN, _OTHER)):
        await decode.run(Submit(f"f{name}", Role.DECODE, tokens, stage.salted(2, salt)))
    await decode.load(_idle, "an idle replica")
    before = _held(decode.heard.blocks())
    answer = await decode.forget(_FORGET_ACME)
    after = _held(decode.heard.blocks())
    gone = {key for tier, key in before - after if tier is Tier.DEVICE}
    assert len(gone) == answer.blocks >= 6
    await decode.until(
        lambda: not gone & {key for _, key in _held(decode.heard.blocks())}, "no tier has them"
    )
    assert answer.in_use == 0
    assert await decode.hit("f3", tokens, stage.salted(2, _ACME)) == 0
    assert await decode.hit("f4", tokens, stage.salted(2, _ACME_OWN)) == 0
    assert await decode.hit("f5", tokens, stage.salted(2, _OTHER)) > 0
    assert await decode.hit("f6", tokens, stage.salted(2, _ACME)) > 0
    assert (await decode.forget(("cc",))).blocks == 0
    await _close(*sides)


async def forgetting_leaves_unsalted_blocks(stage: Stage) -> None:
    """Blocks without a salt have a tag of their own, which alone erases them."""
    _, decode = sides = await _sides(stage)
    tokens = stage.prompt(9)
    await decode.run(Submit("u0", Role.DECODE, tokens, stage.body(2)))
    await decode.forget(_FORGET_ACME)
    assert await decode.hit("u1", tokens, stage.body(2)) > 0
    assert (await decode.forget((UNTAGGED,))).blocks >= 3
    assert await decode.hit("u2", tokens, stage.body(2)) == 0
    await _close(*sides)


async def a_running_stream_survives_being_forgotten(stage: Stage) -> None:
    """A stream goes on to the same tokens; nothing that it computed before or after can be
    found, while it runs or afterwards."""
    _, decode = sides = await _sides(stage)
    tokens, body = stage.prompt(10), stage.salted(200, _ACME)
    await decode.run(Submit("s0", Role.DECODE, tokens, body))
    decode.link.send(Submit("s1", Role.DECODE, tokens, body))
    await decode.until(lambda: len(decode.heard.tokens("s1")) > 20, "tokens of s1")
    assert not decode.heard.finished("s1")
    assert (await decode.forget(_FORGET_ACME)).in_use >= 3
    assert not decode.heard.finished("s1")
    assert await decode.hit("s2", tokens, stage.salted(2, _ACME)) == 0
    await decode.until(lambda: decode.heard.finished("s1"), "s1")
    assert decode.heard.tokens("s1") == decode.heard.tokens("s0")
    await decode.load(_idle, "an idle replica")
    await decode.forget(_FORGET_ACME)
    assert await decode.hit("s3", tokens, stage.salted(2, _ACME)) == 0
    await _close(*sides)


async def a_leased_prefill_survives_being_forgotten(stage: Stage) -> None:
    """A finished prefill that is forgotten before it is read gives the same tokens, and is found
    on neither side afterwards."""
    prefill, decode = await _sides(stage)
    tokens, body = stage.prompt(11), stage.salted(6, _ACME)
    handoff = (await prefill.run(Submit("g0", Role.PREFILL, tokens, body)))[-1].handoff
    await prefill.load(lambda load: load.leased == 1, "a lease")
    await decode.forget(_FORGET_ACME)
    assert (await prefill.forget(_FORGET_ACME)).in_use >= 3
    sources = (await decode.run(Submit("g1", Role.DECODE, tokens, body, handoff)))[0].sources
    assert sources is not None
    assert sources.received_tokens > 0
    await prefill.load(_idle, "the lease to end")
    assert await decode.hit("g2", tokens, body) == 0
    assert decode.heard.tokens("g1") == decode.heard.tokens("g2")
    assert await prefill.hit("g3", tokens, stage.salted(1, _ACME)) == 0
    await _close(prefill, decode)


async def a_prefill_that_runs_when_forgotten_is_not_kept(stage: Stage) -> None:
    """A prefill that has not finished when the order comes says so in its handoff, so that the
    decode replica does not keep it either, whether the order reached that before or after."""
    prefill, decode = await _sides(stage)
    tokens, body = stage.prompt(12), stage.salted(4, _ACME)
    prefill.link.send(Submit("h0", Role.PREFILL, tokens, body))
    order = prefill.order(_FORGET_ACME)
    await prefill.until(lambda: prefill.heard.finished("h0"), "h0")
    await prefill.forgotten(order)
    handoff = prefill.heard.deltas("h0")[-1].handoff
    await decode.run(Submit("h1", Role.DECODE, tokens, body, handoff))
    assert await decode.hit("h2", tokens, body) == 0
    assert decode.heard.tokens("h1") == decode.heard.tokens("h2")
    assert await prefill.hit("h3", tokens, stage.salted(1, _ACME)) == 0
    await _close(prefill, decode)


async def what_is_patient_gives_way(stage: Stage) -> None:
    """A request that comes behind a dozen patient ones begins before the last of them; all are
    answered, and the load tells of none that gives way in the end."""
    _, decode = sides = await _sides(stage)
    patient = [f"w{number}" for number in range(12)]
    for number, name in enumerate(patient, start=20):
        asked = Submit(name, Role.DECODE, stage.prompt(number), stage.body(2))
        keep = Keep(yields=True)
        decode.link.send(msgspec.structs.replace(asked, keep=keep, patience_s=600.0))
    decode.link.send(Submit("urgent", Role.DECODE, stage.prompt(13), stage.body(2)))
    names = [*patient, "urgent"]
    await decode.until(lambda: all(map(decode.heard.finished, names)), "all of them")
    steps = [reply for reply in decode.heard.replies if isinstance(reply, Step)]
    first = {
        name: next(
            at for at, step in enumerate(steps) if any(d.request_id == name for d in step.deltas)
        )
        for name in names
    }
    assert first["urgent"] < max(first[name] for name in patient)
    await decode.load(_idle, "an idle replica")
    assert decode.heard.load.yielding == Yielding()
    await _close(*sides)


# ------------------------------------------------------------------ replicas that lend


# Tenants of whom nothing is forgotten, unless a behaviour says so.
_LENT, _LENT_NO_MORE = "dd.44", "ee.55"


def _head_and_all(
    stage: Stage,
    name: str,
    which: int,
    address: str,
    head_deadline_s: float = 30.0,
    salt: str = _LENT,
) -> tuple[Submit, Submit]:
    """The two parts of a split of a prompt that no tier has: all but its last block is looked for,
    the first half of it computed by the replica at `address`."""
    tokens = stage.prompt(which)
    n_tokens = len(tokens) // TOKEN_BYTES
    half = n_tokens // 2 // stage.block_tokens * stage.block_tokens
    hints = Hints(n_tokens - 1, (), head_deadline_s + 5.0, address, half, head_deadline_s)
    head = tokens[: half * TOKEN_BYTES]
    body = stage.salted(6, salt)
    return (
        Submit(name, Role.PREFILL, head, body, hints=Hints(), lends=True),
        Submit(name, Role.DECODE, tokens, body, hints=hints),
    )


def _by_source(deltas: list[Delta]) -> dict[str, int]:
    sources = deltas[0].sources
    assert sources is not None
    return sources.by_source()


async def a_split_is_one_answer_of_two_replicas(stage: Stage) -> None:
    """P's head comes as it is computed, with nothing handed off; D computes what nobody has. The
    tokens are those that D gives from its own cache, and all bytes that came are counted."""
    prefill, decode = await _sides(stage)
    head, whole = _head_and_all(stage, "x0", 14, prefill.replica.peer_address)
    decode.link.send(whole)
    computed = _by_source(await prefill.run(head))
    await decode.until(lambda: decode.heard.finished("x0"), "x0")
    deltas = decode.heard.deltas("x0")
    half = len(head.tokens) // TOKEN_BYTES
    assert computed == {"computed": half}
    left = len(whole.tokens) // TOKEN_BYTES - half
    assert _by_source(deltas) == {"peer": half, "computed": left}
    spent = deltas[0].spent
    assert spent is not None
    assert spent.loaded_bytes == half * decode.replica.kv_bytes_per_token
    assert spent.loading_s > 0.0
    assert prefill.heard.deltas("x0")[-1].handoff is None
    again = await decode.run(Submit("x1", Role.DECODE, whole.tokens, whole.body))
    assert _by_source(again).keys() == {"device", "computed"}
    assert decode.heard.tokens("x0") == decode.heard.tokens("x1")
    await _close(prefill, decode)


async def a_head_that_was_stopped_is_not_waited_for(stage: Stage) -> None:
    """What P had not computed by then D computes, long before the head's deadline."""
    prefill, decode = await _sides(stage)
    head, whole = _head_and_all(stage, "y0", 15, prefill.replica.peer_address, 300.0)
    prefill.link.send(head)
    prefill.link.send(Abort(["y0"]))
    sources = _by_source(await decode.run(whole))
    assert sources.keys() <= {"peer", "computed"}
    assert sum(sources.values()) == len(whole.tokens) // TOKEN_BYTES
    await _close(prefill, decode)


async def a_head_that_nobody_computes_is_given_up_in_time(stage: Stage) -> None:
    """P was never asked: D computes all once the head's deadline is over."""
    prefill, decode = await _sides(stage)
    _, whole = _head_and_all(stage, "z0", 16, prefill.replica.peer_address, 1.0)
    began = asyncio.get_running_loop().time()
    sources = _by_source(await decode.run(whole))
    assert asyncio.get_running_loop().time() - began >= 1.0
    assert sources == {"computed": len(whole.tokens) // TOKEN_BYTES}
    await _close(prefill, decode)


async def a_split_that_is_aborted_frees_both(stage: Stage) -> None:
    """While D waits for a head it counts as busy with the rest alone, and holds nothing that an
    abort leaves."""
    prefill, decode = await _sides(stage)
    _, whole = _head_and_all(stage, "q0", 17, prefill.replica.peer_address, 300.0)
    decode.link.send(whole)
    await decode.load(lambda load: load.waiting == 1, "a request that waits")
    assert decode.heard.load.pending_prefill_tokens <= stage.block_tokens
    decode.link.send(Abort(["q0"]))
    await decode.load(_idle, "an idle replica")
    assert not decode.heard.tokens("q0")
    await _close(prefill, decode)


async def a_prefix_is_lent(stage: Stage) -> None:
    """What another replica has computed before comes from there, where a plan names it."""
    prefill, decode = await _sides(stage)
    tokens, body = stage.prompt(18), stage.salted(6, _LENT)
    n_tokens = len(tokens) // TOKEN_BYTES
    whole = (n_tokens - 1) // stage.block_tokens * stage.block_tokens
    before = _in_host(prefill)
    await prefill.run(Submit("v0", Role.PREFILL, tokens, body, lends=True))
    # Its answer does not wait for its last blocks to be there.
    n_blocks = whole // stage.block_tokens
    await prefill.until(lambda: len(_in_host(prefill) - before) >= n_blocks, "blocks to lend")
    hints = Hints(n_tokens - 1, (Tier.PEER,), 10.0, prefill.replica.peer_address)
    sources = _by_source(await decode.run(Submit("v1", Role.DECODE, tokens, body, hints=hints)))
    assert sources == {"peer": whole, "computed": n_tokens - whole}, sources
    await _close(prefill, decode)


async def nobody_lends_what_was_just_forgotten(stage: Stage) -> None:
    """A peer may hear of it later: D computes a head at once that P has computed, and lends."""
    prefill, decode = await _sides(stage)
    address = prefill.replica.peer_address
    head, whole = _head_and_all(stage, "u0", 19, address, 300.0, _LENT_NO_MORE)
    await prefill.run(head)
    await decode.forget(("ee",))
    n_tokens = len(whole.tokens) // TOKEN_BYTES
    assert _by_source(await decode.run(whole)) == {"computed": n_tokens}
    await _close(prefill, decode)


def _seconds(*told: Spent) -> list[float]:
    each = ((spent.queued_s, spent.loading_s, spent.computing_s) for spent in told)
    return [seconds for parts in each for seconds in parts]


def _idle(load: Load) -> bool:
    return load.waiting == load.running == load.leased == load.pending_prefill_tokens == 0


def _held(told: list[Blocks]) -> set[tuple[Tier, bytes]]:
    held: set[tuple[Tier, bytes]] = set()
    for blocks in told:
        removed = {(blocks.tier, key) for key in split_keys(blocks.removed)}
        held = set() if blocks.snapshot else held - removed
        held |= {(blocks.tier, key) for key in split_keys(blocks.stored)}
    return held


def _in_host(side: Side) -> set[bytes]:
    return {key for tier, key in _held(side.heard.blocks()) if tier is Tier.HOST}


async def _close(*sides: Side) -> None:
    for side in sides:
        await side.load(_idle, "an idle replica")
        side.link.close()


BEHAVIOURS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    it_welcomes_first,
    a_handoff_gives_the_same_tokens,
    the_first_delta_tells_the_seconds,
    waiting_is_told_apart_from_computing,
    a_prefill_that_lends_keeps_no_lease,
    an_abort_frees,
    a_release_ends_the_lease,
    an_abort_before_the_read_ends_the_lease,
    blocks_have_no_gaps,
    load_is_zero_when_idle,
    forgetting_erases_one_tenant_only,
    forgetting_leaves_unsalted_blocks,
    a_running_stream_survives_being_forgotten,
    a_leased_prefill_survives_being_forgotten,
    a_prefill_that_runs_when_forgotten_is_not_kept,
    what_is_patient_gives_way,
)

# Of replicas with a peer tier, which all the above is true of too.
LENDING: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    a_split_is_one_answer_of_two_replicas,
    a_head_that_was_stopped_is_not_waited_for,
    a_head_that_nobody_computes_is_given_up_in_time,
    a_split_that_is_aborted_frees_both,
    a_prefix_is_lent,
    nobody_lends_what_was_just_forgotten,
)
