"""What each replica did with an order to forget, told once and within its time."""

import asyncio
from dataclasses import dataclass, field

import pytest

from router.forget import Outcome, forget
from router.member import Member
from workers.messages import Forget, Forgotten, Request, Role, Welcome
from workers.sim import SimCosts, sim_replica

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0)


@dataclass(slots=True)
class NotingLink:
    """Notes what is sent."""

    sent: list[Request] = field(default_factory=list)

    def send(self, request: Request) -> None:
        self.sent.append(request)

    def close(self) -> None:
        pass


def member(name: str, up: bool = True) -> tuple[Member, NotingLink]:
    link = NotingLink()
    replica = sim_replica(name, Role.DECODE, SimCosts())
    made = Member(replica, lambda _: link, lambda *_: None, asyncio.get_running_loop().time)
    if up:
        made.receive(Welcome(replica))
    return made, link


def ordered(link: NotingLink) -> str:
    [order] = [request for request in link.sent if isinstance(request, Forget)]
    assert order.tags == ("aa",)
    return order.order_id


async def test_every_replica_s_answer_is_told() -> None:
    """Those that answer say how much; one that is down is not asked; one that says nothing in
    time, or is lost meanwhile, is to be asked again."""
    names = ("fast", "down", "mute", "lost")
    fast, down, mute, lost = (member(name, up=name != "down") for name in names)
    async with asyncio.TaskGroup() as tasks:
        members = [seat for seat, _ in (fast, down, mute, lost)]
        asked = tasks.create_task(forget(members, ("aa",), 5.0))
        await asyncio.sleep(1.0)
        fast[0].receive(Forgotten(ordered(fast[1]), 7, 2))
        lost[0].lose("silent for 3.0 s")
    outcomes = asked.result()
    assert asyncio.get_running_loop().time() == 5.0
    assert outcomes[0] == Outcome("fast", 7, 2)
    complaints = [outcome.complaint or "" for outcome in outcomes[1:]]
    for complaint, says in zip(complaints, ("down", "5 s", "silent"), strict=True):
        assert says in complaint
        assert "forget again" in complaint
    assert down[1].sent == []


async def test_an_answer_ends_its_own_order_only() -> None:
    """Late answers and those to another order are dropped."""
    asked, link = member("one")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asked.forget(("aa",)), 1.0)
    late = ordered(link)
    link.sent.clear()
    again = asyncio.create_task(asked.forget(("aa",)))
    await asyncio.sleep(0.1)
    asked.receive(Forgotten(late, 1))
    await asyncio.sleep(0.1)
    assert not again.done()
    asked.receive(Forgotten(ordered(link), 2))
    assert (await again).blocks == 2
