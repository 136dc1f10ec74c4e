"""Both ends of the direct channel over loopback, in front of an engine that only notes orders."""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

import workers
from kv.catalogue import Tier
from kv.codecs.codec import CodecName
from kv.plan import Hints
from workers import channel, server
from workers.channel import ChannelLink
from workers.curve import client_keys, server_keys, unlock
from workers.erasure import Erased
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    Forget,
    Forgotten,
    Keep,
    Load,
    Reply,
    Reset,
    Resync,
    Role,
    Step,
    Submit,
    Welcome,
    encode,
)
from workers.mirror import Change
from workers.server import ReplicaServer
from workers.sim import SimCosts, sim_replica

REPLICA = sim_replica("decode-0", Role.DECODE, SimCosts())
SECRET = bytes(range(32))
SUBMIT = Submit("r1", Role.DECODE, b"\x01\0\0\0", b"body")


@dataclass(slots=True)
class NotingEngine:
    """Takes orders as `workers.engine.Engine` does, and only notes them."""

    held: bytes = b"k" * 16
    on_disk: bytes = b""
    hints: list[tuple[Hints | None, Keep | None]] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    forgot: int = 0
    erased: list[tuple[str, ...]] = field(default_factory=list)
    failure: BaseException | None = None
    stalled: float = 0.0

    def add(
        self,
        request: Any,
        answered: list[int],
        hints: Hints | None,
        keep: Keep | None,
        patience_s: float | None,
    ) -> None:
        if request == b"bad":
            raise ValueError("no such option")
        self.added.append(request)
        self.hints.append((hints, keep, patience_s))

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def stalled_s(self) -> float:
        return self.stalled

    def forget(self) -> None:
        self.forgot += 1

    def erase(self, tags: tuple[str, ...], receiver: Callable[[Erased], None]) -> None:
        self.erased.append(tags)
        receiver(Erased(blocks=7, in_use=2))

    def snapshot(self, receiver: Callable[[dict[Tier, bytes]], None]) -> None:
        receiver({Tier.DEVICE: self.held, Tier.DISK: self.on_disk})


@dataclass(slots=True)
class Inbox:
    replies: list[Reply] = field(default_factory=list)

    def receive(self, reply: Reply) -> None:
        self.replies.append(reply)

    def of(self, kind: type) -> list[Any]:
        return [reply for reply in self.replies if isinstance(reply, kind)]


@dataclass(slots=True)
class Pair:
    """A served engine, and a link to it."""

    server: ReplicaServer
    engine: NotingEngine
    serving: asyncio.Task[None]
    inbox: Inbox
    link: ChannelLink


async def until(true: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """Connected and following; the stand-in for `workers.work` needs no vLLM."""
    work = SimpleNamespace(engine_request=lambda submit: submit.body)
    monkeypatch.setitem(sys.modules, "workers.work", work)
    monkeypatch.setattr(workers, "work", work, raising=False)
    monkeypatch.setattr(server, "_BEAT_S", 0.02)
    monkeypatch.setattr(channel, "_HELLO_EVERY_S", 0.05)
    served, engine, inbox = ReplicaServer("127.0.0.1", server_keys(SECRET)), NotingEngine(), Inbox()
    serving = asyncio.create_task(served.serve(engine, REPLICA))  # type: ignore[arg-type]
    keys = client_keys(SECRET)
    link = ChannelLink(served.address, "ingress-0", inbox, keys, follow=True)
    await until(lambda: inbox.of(Blocks))
    yield Pair(served, engine, serving, inbox, link)
    link.close()
    await stop(serving)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def stop(serving: "asyncio.Task[None]") -> None:
    if serving.done():  # the test has looked at how it ended
        return
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def report(deltas: list[Delta], stored: bytes = b"", removed: bytes = b"", **load: int) -> Any:
    """What the engine's thread hands over after a step."""
    changes = (Change(stored, removed),) if stored or removed else ()
    return SimpleNamespace(deltas=deltas, changes=changes, load=Load(**load))


async def test_a_first_hello_is_welcomed_once(pair: Pair) -> None:
    """Welcome, Load and a snapshot come first; later Hellos only keep the connection."""
    await until(lambda: pair.inbox.of(Blocks))
    # On a busy machine a beat may be due before the snapshot.
    welcome, load, *_ = pair.inbox.replies
    assert (welcome, load) == (Welcome(REPLICA), Load())
    told = [reply for reply in pair.inbox.replies if not isinstance(reply, Load)]
    assert told == [welcome, Blocks(0, stored=b"k" * 16, snapshot=True)]
    await asyncio.sleep(0.2)
    assert len(pair.inbox.of(Welcome)) == 1


async def test_a_step_s_deltas_arrive_as_one_message(pair: Pair) -> None:
    """Only the deltas of this ingress's requests come, and none after the last."""
    pair.link.send(SUBMIT)
    await until(lambda: pair.engine.added)
    mine, others = Delta("r1", [7]), Delta("r2", [8])
    pair.server.report(report([mine, others]))
    pair.server.report(report([Delta("r1", [9], "stop")]))
    pair.server.report(report([Delta("r1", [10])]))
    pair.server.report(report([], stored=b"e" * 16))
    await until(lambda: len(pair.inbox.of(Blocks)) == 2)
    assert pair.inbox.of(Step) == [Step([mine]), Step([Delta("r1", [9], "stop")])]


async def test_blocks_are_numbered_and_told_again_on_resync(pair: Pair) -> None:
    """Numbers grow by one; a snapshot on request takes the number of the last change."""
    for key in (b"a", b"b"):
        pair.server.report(report([], stored=key * 16))
    pair.engine.held = b"all of it"
    await until(lambda: len(pair.inbox.of(Blocks)) == 3)
    pair.link.send(Resync())
    await until(lambda: len(pair.inbox.of(Blocks)) == 4)
    assert [blocks.sequence for blocks in pair.inbox.of(Blocks)] == [0, 1, 2, 2]
    assert pair.inbox.of(Blocks)[-1] == Blocks(2, stored=b"all of it", snapshot=True)


async def test_every_tier_is_in_a_snapshot_and_in_the_changes_behind_it(pair: Pair) -> None:
    """One sequence counts the messages of all tiers; only the first of a snapshot says that it is
    one, also where the paged KV holds nothing."""
    pair.server.report(
        SimpleNamespace(
            deltas=[],
            changes=(Change(b"a" * 16), Change(b"b" * 16, b"c" * 16, Tier.DISK)),
            load=Load(),
        )
    )
    pair.engine.held, pair.engine.on_disk = b"", b"d" * 16
    await until(lambda: len(pair.inbox.of(Blocks)) == 3)
    pair.link.send(Resync())
    await until(lambda: len(pair.inbox.of(Blocks)) == 4)
    *_, device, disk, again = (msgspec.structs.replace(b, at_s=0) for b in pair.inbox.of(Blocks))
    assert device == Blocks(1, b"a" * 16)
    assert disk == Blocks(2, b"b" * 16, b"c" * 16, tier=Tier.DISK)
    assert again == Blocks(2, b"d" * 16, snapshot=True, tier=Tier.DISK)


async def test_a_request_s_hints_reach_the_engine(pair: Pair) -> None:
    """As they were sent; none is none."""
    hints = Hints(64, (Tier.HOST,), 0.5)
    pair.link.send(SUBMIT)
    keep = Keep(CodecName.INT8, 60.0)
    told = {"hints": hints, "keep": keep, "patience_s": 9.0}
    pair.link.send(msgspec.structs.replace(SUBMIT, request_id="r2", **told))
    await until(lambda: len(pair.engine.added) == 2)
    assert pair.engine.hints == [(None, None, None), (hints, keep, 9.0)]


async def test_load_is_told_when_it_changes(pair: Pair) -> None:
    """A change of load or lanes arrives with the next beat."""
    pair.server.report(report([], running=3))
    pair.server.show_lanes(("cma/memory",))
    await until(lambda: pair.inbox.of(Load)[-1] == Load(running=3, lanes=("cma/memory",)))


async def test_orders_reach_the_engine(pair: Pair) -> None:
    """Submit, Abort and Reset arrive in order; a request that was aborted says no more."""
    for message in (SUBMIT, Abort(["r1"]), Reset()):
        pair.link.send(message)
    await until(lambda: pair.engine.forgot)
    assert (pair.engine.added, pair.engine.aborted) == ([b"body"], ["r1"])
    pair.server.report(report([Delta("r1", [7])], stored=b"e" * 16))
    await until(lambda: len(pair.inbox.of(Blocks)) == 2)
    assert pair.inbox.of(Step) == []


async def test_an_order_to_forget_is_answered_once_carried_out(pair: Pair) -> None:
    """Whoever asked is told how much was erased."""
    pair.link.send(Forget("o1", ("aa", "bb")))
    await until(lambda: pair.inbox.of(Forgotten))
    assert pair.engine.erased == [("aa", "bb")]
    assert pair.inbox.of(Forgotten) == [Forgotten("o1", 7, 2)]


async def test_a_request_that_cannot_start_is_answered_with_an_error(pair: Pair) -> None:
    """One bad request ends itself, not the replica."""
    pair.link.send(Submit("bad", Role.DECODE, b"", b"bad"))
    await until(lambda: pair.inbox.of(Step))
    [refusal] = pair.inbox.of(Step)[0].deltas
    assert (refusal.request_id, refusal.finish_reason) == ("bad", "error")
    assert "no such option" in refusal.error
    assert not pair.serving.done()


async def test_garbage_is_dropped(pair: Pair) -> None:
    """Bytes that are no message end neither the replica nor the connection."""
    for frame in (b"", b"\xc1", encode(Load())):
        pair.link._socket.send(frame)
    pair.link.send(Reset())
    await until(lambda: pair.engine.forgot)
    assert not pair.serving.done()


async def test_a_silent_ingress_is_dropped_with_its_requests(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it ran is aborted; when it speaks again it is welcomed anew."""
    pair.link.send(SUBMIT)
    await until(lambda: pair.engine.added)
    monkeypatch.setattr(channel, "_HELLO_EVERY_S", 0.6)
    monkeypatch.setattr(server, "SILENCE_S", 0.2)
    await until(lambda: pair.engine.aborted == ["r1"])
    await until(lambda: len(pair.inbox.of(Welcome)) == 2)


async def test_a_link_that_closes_frees_its_requests(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica notices that the ingress is gone."""
    pair.link.send(SUBMIT)
    await until(lambda: pair.engine.added)
    monkeypatch.setattr(server, "SILENCE_S", 0.2)
    pair.link.close()
    assert pair.link._socket.closed
    await until(lambda: pair.engine.aborted == ["r1"])


async def test_what_is_sent_on_a_closed_link_is_dropped(pair: Pair) -> None:
    """Whoever learns of a loss may want to release a handoff there: at once, before the loop has
    had a turn, and later. Neither raises, or it would end the ingress."""
    pair.link.close()
    pair.link.send(SUBMIT)
    await asyncio.sleep(0.01)
    pair.link.send(SUBMIT)


async def test_a_stranger_s_request_is_not_run(pair: Pair) -> None:
    """Who has not said Hello could not be answered."""
    with zmq.asyncio.Context.instance().socket(zmq.DEALER) as stranger:
        unlock(stranger, client_keys(SECRET))
        stranger.connect(pair.server.address)
        await stranger.send(encode(SUBMIT))
        await stranger.send(encode(Reset()))
        await until(lambda: pair.engine.forgot)
        assert pair.engine.added == []


async def test_stopping_frees_the_port(pair: Pair) -> None:
    """A replica that is stopped leaves its port to the next."""
    await stop(pair.serving)
    host, port = pair.server.address.removeprefix("tcp://").split(":")

    def bindable() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) != 0

    await until(bindable)


async def test_a_dead_engine_ends_its_server(pair: Pair) -> None:
    """Once the step loop has ended the channel ends too: an ingress must hear silence, not a
    load report that looks idle."""
    pair.engine.failure = RuntimeError("out of memory")
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(asyncio.shield(pair.serving), 5)
    assert "out of memory" in str(ended.value.exceptions[0])


async def test_an_engine_that_stands_still_falls_silent(pair: Pair) -> None:
    """A loop that hangs with work stops the load reports, so that others take over."""
    pair.engine.stalled = 1000.0
    await asyncio.sleep(0.6)
    told = len(pair.inbox.of(Load))
    pair.server.report(report([], running=3))
    await asyncio.sleep(1.4)
    assert len(pair.inbox.of(Load)) == told


async def test_a_handoff_that_crossed_its_abort_is_delivered(pair: Pair) -> None:
    """A prefill that had finished when its abort came still tells its handoff, once, so that
    its blocks can be released; other late deltas are dropped."""
    pair.link.send(SUBMIT)
    pair.link.send(Abort(["r1"]))
    await until(lambda: pair.engine.aborted)
    pair.server.report(report([Delta("r1", [5])]))
    late = Delta("r1", [7], "length", handoff={"remote_request_id": "r1"})
    pair.server.report(report([late]))
    pair.server.report(report([late]))
    await until(lambda: pair.inbox.of(Step))
    await asyncio.sleep(0.1)
    assert pair.inbox.of(Step) == [Step([late])]


async def test_a_message_of_many_frames_is_dropped(pair: Pair) -> None:
    """Frames that are no message of ours end nothing."""
    pair.link._socket.send_multipart([b"a", b"b", b"c"])
    pair.link.send(Reset())
    await until(lambda: pair.engine.forgot)
    assert not pair.serving.done()


async def test_draining_is_told(pair: Pair) -> None:
    """A replica that drains says so, and has drained once nothing runs."""
    await asyncio.wait_for(pair.server.drain(), 5)
    await until(lambda: pair.inbox.of(Load)[-1].draining)


async def test_after_standing_still_nothing_old_is_begun(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that was stopped and goes on ends what it ran, and does not begin what its
    ingress sent before it gave it up: the pages behind a handoff may be another prompt's. A new
    connection is served."""
    pair.link.send(SUBMIT)
    await until(lambda: pair.engine.added)
    monkeypatch.setattr(server, "_LAPSE_S", 0.2)
    pair.link.send(msgspec.structs.replace(SUBMIT, request_id="late"))
    time.sleep(0.4)  # noqa: ASYNC251 as SIGSTOP would do
    await until(lambda: pair.engine.aborted == ["r1"])
    await asyncio.sleep(0.15)
    assert len(pair.engine.added) == 1
    inbox = Inbox()
    again = ChannelLink(pair.server.address, "ingress-0", inbox, client_keys(SECRET))
    await until(lambda: inbox.of(Welcome))
    again.send(msgspec.structs.replace(SUBMIT, request_id="new"))
    await until(lambda: len(pair.engine.added) == 2)
    again.close()
