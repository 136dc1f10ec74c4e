"""The room as operators see it, and what it goes by."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from kv.block import pack_tokens
from router.context import RequestContext, ServiceClass
from router.member import Member
from router.request import Request
from router.settings import BatchBounds
from router.waiting import Room, RoomMetrics
from workers.messages import Load, Role, Submit, Welcome, Yielding
from workers.sim import SimCosts, sim_replica

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0)


class NoLink:
    """Nobody listens."""

    def send(self, request: object) -> None: ...

    def close(self) -> None: ...


class Two:
    """A prefill and a decode replica whose loads a test sets."""

    def __init__(self) -> None:
        now = asyncio.get_running_loop().time
        self.of = {}
        for role in Role:
            replica = sim_replica(f"{role}-0", role, SimCosts())
            member = Member(replica, lambda _: NoLink(), lambda *_: None, now)
            member.receive(Welcome(replica))
            self.of[role] = member

    def up(self, role: Role) -> Sequence[Member]:
        return [self.of[role]]


def request(name: str, service_class: ServiceClass = ServiceClass.BATCH) -> Request:
    context = RequestContext(name, service_class=service_class)
    return Request(name, pack_tokens(range(100)), b"", None, context)


async def test_its_metrics_show_who_waits_and_why_others_were_begun() -> None:
    """One waits while a person's prompt is computed, and is begun when that is over; then another
    while batch requests hold their share of pages, until it is old."""
    two, registry = Two(), CollectorRegistry()
    metrics = RoomMetrics(registry)
    now = asyncio.get_running_loop().time
    room = metrics.room = Room(two, BatchBounds(max_age_s=60.0), now, metrics)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"breakeven_batch_{name}", labels)

    async def hold(name: str) -> float | None:
        async with room.turn(request(name)) as (asked, place):
            await asyncio.sleep(1.0)
            place.answered()
            assert place.waited_s == pytest.approx(now() - 1.0 - began, abs=0.1)
            return asked.patience_s(now())

    two.of[Role.PREFILL].receive(Load(pending_prefills=1))
    began = now()
    first = asyncio.create_task(hold("first"))
    await asyncio.sleep(5.0)
    assert (value("waiting"), value("running")) == (1, 0)
    assert value("oldest_wait_seconds") == pytest.approx(5.0)
    two.of[Role.PREFILL].receive(Load(pending_prefills=1, yielding=Yielding(pending_prefills=1)))
    await asyncio.sleep(0.5)
    assert (value("waiting"), value("running")) == (0, 1)
    patience_s = await first
    assert patience_s == pytest.approx(60.0 - 6.0, abs=0.2)
    assert value("wait_seconds_sum", reason="room") == pytest.approx(5.0, abs=0.1)
    two.of[Role.DECODE].receive(Load(running=1, yielding=Yielding(running=1, kv_usage=0.3)))
    began = now()
    assert await hold("second") is None  # as urgent as any
    assert value("wait_seconds_count", reason="age") == 1
    assert value("running") == 0


async def test_those_who_are_old_together_are_begun_one_by_one() -> None:
    """Ten that came at once, and that have waited as long as they may: the next one is begun when
    the one before has its first token, and people are in front of one of them, not of ten."""
    two = Two()
    two.of[Role.PREFILL].receive(Load(pending_prefills=9))
    room = Room(two, BatchBounds(max_age_s=60.0), asyncio.get_running_loop().time)
    begun = 0

    async def hold(name: str) -> None:
        nonlocal begun
        async with room.turn(request(name)) as (_, place):
            begun += 1
            await asyncio.sleep(1.0)
            place.answered()
            await asyncio.sleep(5.0)

    asked = [asyncio.create_task(hold(f"old-{number}")) for number in range(10)]
    await asyncio.sleep(60.5)
    assert begun == 1
    await asyncio.sleep(4.0)
    assert begun == 5
    await asyncio.gather(*asked)
    assert (begun, room.running) == (10, 0)


async def test_people_are_neither_held_up_nor_counted_as_batch() -> None:
    """Whatever the load."""
    two = Two()
    two.of[Role.PREFILL].receive(Load(pending_prefills=9))
    room = Room(two, BatchBounds(), asyncio.get_running_loop().time)
    asked = request("p", ServiceClass.INTERACTIVE)
    async with room.turn(asked) as (same, place):
        assert same is asked
        assert (room.crowd().streams, room.running, place.waited_s) == (1, 0, 0.0)
    assert room.crowd().streams == 0


async def test_a_person_at_a_prefill_replica_keeps_it_from_batch_requests() -> None:
    """As soon as the request is sent, before the replica reports it; one that a decode replica
    computes beside it does not."""
    two = Two()
    room = Room(two, BatchBounds(), asyncio.get_running_loop().time)
    async with room.turn(request("p", ServiceClass.INTERACTIVE)):
        assert room.crowd().urgent_prompts == 0
        async with two.of[Role.PREFILL].run(Submit("x", Role.PREFILL, b"", b"")):
            assert room.crowd().urgent_prompts == 1
        patient = Submit("y", Role.PREFILL, b"", b"", patience_s=1.0)
        async with two.of[Role.PREFILL].run(patient):
            assert room.crowd().urgent_prompts == 0
