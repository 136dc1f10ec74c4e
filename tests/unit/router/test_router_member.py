import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from kv.block import pack_tokens
from router.member import Member
from workers.errors import ReplicaLostError
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    Load,
    Release,
    Request,
    Resync,
    Role,
    Step,
    Submit,
    Welcome,
)
from workers.sim import SimCosts, sim_replica

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0)

REPLICA = sim_replica("decode-0", Role.DECODE, SimCosts())
SUBMIT = Submit("r1", Role.PREFILL, pack_tokens(range(40)), b"")
HANDOFF = {"remote_request_id": "r1"}
DONE = Delta("r1", [7], "length", handoff=HANDOFF)


@dataclass(slots=True)
class NotingLink:
    """Notes what is sent."""

    sent: list[Request] = field(default_factory=list)
    closed: bool = False

    def send(self, request: Request) -> None:
        self.sent.append(request)

    def close(self) -> None:
        self.closed = True


class Seat:
    """A welcomed member, what it sent, and what it was told of blocks."""

    def __init__(self, probe: Submit | None = None) -> None:
        self.link = NotingLink()
        self.blocks: list[Blocks] = []
        self.unread: list[dict[str, Any]] = []
        self.member = Member(
            REPLICA,
            lambda _: self.link,
            lambda _, blocks: self.blocks.append(blocks),
            asyncio.get_running_loop().time,
            None if probe is None else lambda: probe,
        )
        assert not self.member.up
        self.member.receive(Welcome(REPLICA))

    def run(
        self, leave_after: int | None = None, submit: Submit = SUBMIT
    ) -> "asyncio.Task[list[Delta]]":
        """A client of one request, that may leave after some deltas."""

        async def client() -> list[Delta]:
            seen = []
            async with self.member.run(submit, self.unread.append) as deltas:
                async for delta in deltas:
                    seen.append(delta)
                    if len(seen) == leave_after:
                        break
            return seen

        return asyncio.create_task(client())

    def say(self, *deltas: Delta) -> None:
        self.member.receive(Step(list(deltas)))


async def settled() -> None:
    await asyncio.sleep(0.001)


async def test_deltas_come_until_one_has_a_finish_reason() -> None:
    """All deltas of the request and no other's; nothing is aborted at the end."""
    seat = Seat()
    task = seat.run()
    await settled()
    first = Delta("r1", [1])
    seat.say(first, Delta("r2", [9]))
    seat.say(DONE)
    assert await task == [first, DONE]
    assert seat.link.sent == [SUBMIT]
    assert (seat.member.requests, seat.unread) == (0, [])


async def test_leaving_early_aborts() -> None:
    """A client that leaves the block mid-stream has its request aborted."""
    seat = Seat()
    task = seat.run(leave_after=1)
    await settled()
    seat.say(Delta("r1", [1]))
    await task
    assert seat.link.sent == [SUBMIT, Abort(["r1"])]
    assert seat.member.requests == 0


async def test_cancelling_aborts() -> None:
    """So has one that is cancelled while it waits."""
    seat = Seat()
    task = seat.run()
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seat.link.sent == [SUBMIT, Abort(["r1"])]
    assert seat.member.requests == 0


async def test_a_handoff_that_crossed_the_abort_is_unread() -> None:
    """A prefill that finished all the same gives its handoff back, once."""
    seat = Seat()
    task = seat.run()
    await settled()
    task.cancel()
    await asyncio.wait([task])
    seat.say(DONE)
    seat.say(DONE)
    assert seat.unread == [HANDOFF]


async def test_a_handoff_that_arrived_as_the_client_left_is_unread() -> None:
    """It lies in the queue when the client is cancelled."""
    seat = Seat()
    task = seat.run()
    await settled()
    seat.say(DONE)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert seat.unread == [HANDOFF]
    assert seat.link.sent == [SUBMIT]


async def test_a_handoff_that_was_read_is_not_unread() -> None:
    """Who took the delta owns the handoff."""
    seat = Seat()
    task = seat.run(leave_after=1)
    await settled()
    seat.say(DONE)
    await task
    assert seat.unread == []


async def test_orphans_are_forgotten() -> None:
    """Waiting for handoffs that never come does not add up."""
    seat = Seat()
    for number in range(3):
        task = seat.run(submit=Submit(f"r{number}", Role.PREFILL, b"", b""))
        await settled()
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(6.0)
    assert len(seat.member._orphans) == 1


@pytest.mark.parametrize(
    "delta", [Delta("r1", [], "error"), Delta("r1", [], error="no room"), Delta("r1", [1], "error")]
)
async def test_an_error_loses_the_replica_for_this_request(delta: Delta) -> None:
    """The request fails over; the replica stays up."""
    seat = Seat()
    task = seat.run()
    await settled()
    seat.say(delta)
    with pytest.raises(ReplicaLostError, match="decode-0: r1: "):
        await task
    assert seat.member.up
    assert seat.member.requests == 0


async def test_losing_it_fails_every_request() -> None:
    """Streams end at once, and nothing is sent to the dead."""
    seat = Seat()
    task = seat.run()
    await settled()
    seat.member.lose("silent for 3.2 s")
    with pytest.raises(ReplicaLostError, match=r"silent for 3\.2 s"):
        await task
    assert seat.link.sent == [SUBMIT]
    assert (seat.member.up, seat.member.requests) == (False, 0)


async def test_a_second_welcome_loses_what_ran() -> None:
    """The replica had dropped us and our requests; it is up for new ones, and its blocks are
    told anew from a snapshot."""
    seat = Seat()
    task = seat.run()
    await settled()
    seat.member.receive(Blocks(5, snapshot=True))
    seat.member.receive(Welcome(REPLICA))
    with pytest.raises(ReplicaLostError, match="dropped this ingress"):
        await task
    assert seat.member.up
    seat.member.receive(Blocks(6))
    seat.member.receive(Blocks(0, snapshot=True))
    seat.member.receive(Blocks(1))
    assert [blocks.sequence for blocks in seat.blocks] == [5, 0, 1]


async def test_another_engine_s_welcome_is_not_this_replica() -> None:
    """A restart under the same address is void until the directory names its epoch."""
    seat = Seat()
    seat.member.receive(Welcome(sim_replica("decode-0", Role.DECODE, SimCosts(), epoch="2")))
    assert not seat.member.up


PROBE = Submit("probe", Role.DECODE, pack_tokens([1]), b"")


async def test_it_is_up_once_a_probe_is_answered() -> None:
    """A process that welcomes may still hang: only its engine's answer makes it routable."""
    seat = Seat(PROBE)
    assert seat.link.sent == [PROBE]
    seat.member.receive(Load())
    assert not seat.member.up
    seat.say(Delta("probe", [1], "length"))
    assert seat.member.up


async def test_a_probe_without_an_answer_is_sent_again() -> None:
    """Lost or refused, it is aborted and tried anew while the replica beats."""
    seat = Seat(PROBE)
    seat.say(Delta("probe", [], "error", error="no room"))
    for _ in range(6):
        await asyncio.sleep(1.0)
        seat.member.receive(Load())
    assert not seat.member.up
    assert seat.link.sent == [PROBE, Abort(["probe"]), PROBE]
    seat.say(Delta("probe", [1], "length"))
    assert seat.member.up


async def test_a_lost_replica_is_not_proved_by_an_old_probe() -> None:
    """An answer that comes after it was given up says nothing of now."""
    seat = Seat(PROBE)
    seat.member.lose("silent")
    seat.say(Delta("probe", [1], "length"))
    assert not seat.member.up


async def test_a_gap_asks_for_a_snapshot_once() -> None:
    """After a missed message nothing is passed on until the snapshot comes."""
    seat = Seat()
    for blocks in (Blocks(0), Blocks(4, snapshot=True), Blocks(5), Blocks(7), Blocks(8)):
        seat.member.receive(blocks)
    assert seat.link.sent == [Resync()]
    seat.member.receive(Blocks(8, snapshot=True))
    seat.member.receive(Blocks(9))
    assert [blocks.sequence for blocks in seat.blocks] == [4, 5, 8, 9]


async def test_anything_heard_is_a_sign_of_life() -> None:
    """Every message, of whatever kind, is noted with its time."""
    seat = Seat()
    for reply in (Load(), Step([]), Blocks(1)):
        await asyncio.sleep(1.0)
        seat.member.receive(reply)
        assert seat.member.heard_at == asyncio.get_running_loop().time()


async def test_closing_ends_the_link() -> None:
    """A replica that left the cluster gets nothing more."""
    seat = Seat()
    seat.member.close()
    assert seat.link.closed
    assert not seat.member.up


async def test_a_release_goes_to_the_replica() -> None:
    """Under a name of its own, with the handoff."""
    seat = Seat()
    seat.member.release("r1.release", HANDOFF)
    assert seat.link.sent == [Release("r1.release", HANDOFF)]


async def test_its_curve_is_the_one_it_measured() -> None:
    """The samples of its announcement give the router's first curve."""
    seat = Seat()
    assert seat.member.speed.curve.seconds(700, 90) == pytest.approx(
        SimCosts().prefill.seconds(700, 90), rel=1e-3
    )
