import asyncio
from collections.abc import Sequence

import pytest

from router.member import Member
from router.roster import Roster
from workers.messages import Load, Replica, Request, Role, Welcome
from workers.sim import SimCosts, sim_replica

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0)

REPLICA = sim_replica("decode-0", Role.DECODE, SimCosts())


class Silence:
    """A link to a replica that never says anything."""

    def send(self, request: Request) -> None: ...

    def close(self) -> None: ...


class Keeper:
    """Notes the members that it made."""

    def __init__(self) -> None:
        self.made: list[Member] = []
        self.lost_ones: list[Member] = []

    async def replicas(self) -> Sequence[Replica]:
        return [REPLICA]

    def make(self, replica: Replica) -> Member:
        now = asyncio.get_running_loop().time
        self.made.append(Member(replica, lambda _: Silence(), lambda m, b: None, now))
        return self.made[-1]

    def lost(self, member: Member) -> None:
        self.lost_ones.append(member)

    def gone(self, member: Member) -> None:
        raise AssertionError("it is still announced")


async def test_one_that_is_announced_and_never_answers_is_tried_again() -> None:
    """A connection that came to nothing is no reason to do without a replica for ever; one that
    answers is kept, and lost by silence."""
    keeper = Keeper()
    roster = Roster(keeper, keeper, asyncio.get_running_loop().time)
    watching = asyncio.create_task(roster.watch())
    await asyncio.sleep(9.0)
    assert len(keeper.made) == 1
    await asyncio.sleep(3.0)
    assert len(keeper.made) == 2
    last = keeper.made[-1]
    last.receive(Welcome(REPLICA))
    assert roster.up(Role.DECODE) == (last,)
    for _ in range(15):
        await asyncio.sleep(1.0)
        last.receive(Load())
    assert keeper.made[-1] is last
    await asyncio.sleep(4.0)
    assert keeper.lost_ones[-1] is last
    assert len(keeper.made) == 3
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_time_in_which_nobody_could_be_heard_is_no_silence() -> None:
    """A process that stood still for longer than the silence that it forgives others finds their
    words in its queues: nobody is lost for it."""
    keeper, clock = Keeper(), [0.0]
    roster = Roster(keeper, keeper, lambda: clock[0])
    watching = asyncio.create_task(roster.watch())

    async def pass_s(seconds: float) -> None:
        for _ in range(int(seconds / 0.25)):
            clock[0] += 0.25
            await asyncio.sleep(0.25)

    await pass_s(2.0)
    member = keeper.made[0]
    member._now = lambda: clock[0]
    member.receive(Welcome(REPLICA))
    clock[0] += 60.0  # nothing ran meanwhile
    await pass_s(2.5)
    assert member.up
    await pass_s(2.0)
    assert not member.up
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
