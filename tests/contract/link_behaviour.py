"""What a replica does at the other end of a `Link`: run on the simulator and on real engines.

Plain functions over a `Stage`; `BEHAVIOURS` lists them. Each waits at most `Stage.patience_s` for
something to become true, so that they hold on virtual and on real time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kv.block import TOKEN_BYTES, split_keys
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    Inbox,
    Link,
    Load,
    Release,
    Reply,
    Resync,
    Role,
    Step,
    Submit,
    Welcome,
)

Connect = Callable[[Inbox], Link]


@dataclass(frozen=True, slots=True)
class Stage:
    """One prefill and one decode replica, both idle and with an empty cache for these prompts.

    `prompt(i)` gives packed tokens of at least three blocks, different for each i; `body(n)` asks
    for n greedy tokens whatever they are.
    """

    prefill: Connect
    decode: Connect
    prompt: Callable[[int], bytes]
    body: Callable[[int], bytes]
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
    """Block changes are numbered without gaps, and add up to what a fresh snapshot says."""
    prefill, decode = await _sides(stage)
    for number in range(4, 7):
        ask = Submit(f"k{number}", Role.DECODE, stage.prompt(number), stage.body(2))
        await decode.run(ask)
    await decode.load(_idle, "an idle replica")
    follower = Side(stage, stage.decode)
    await follower.followed()
    told = decode.heard.blocks()
    assert told[0].snapshot
    first = told[0].sequence
    assert [b.sequence for b in told] == list(range(first, first + len(told)))
    assert len(told) > 1
    assert _held(told) == _held(follower.heard.blocks())
    decode.link.send(Resync())
    await decode.until(lambda: decode.heard.blocks()[-1].snapshot, "a snapshot on request")
    assert decode.heard.blocks()[-1].sequence == told[-1].sequence
    assert _held(decode.heard.blocks()[-1:]) == _held(told)
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


def _idle(load: Load) -> bool:
    return load.waiting == load.running == load.leased == load.pending_prefill_tokens == 0


def _held(told: list[Blocks]) -> set[bytes]:
    held: set[bytes] = set()
    for blocks in told:
        held = set() if blocks.snapshot else held - set(split_keys(blocks.removed))
        held |= set(split_keys(blocks.stored))
    return held


async def _close(*sides: Side) -> None:
    for side in sides:
        await side.load(_idle, "an idle replica")
        side.link.close()


BEHAVIOURS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    it_welcomes_first,
    a_handoff_gives_the_same_tokens,
    an_abort_frees,
    a_release_ends_the_lease,
    an_abort_before_the_read_ends_the_lease,
    blocks_have_no_gaps,
    load_is_zero_when_idle,
)
