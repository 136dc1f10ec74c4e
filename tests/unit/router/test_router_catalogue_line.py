"""A line over real ZMQ sockets on loopback, to a catalogue in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import zmq
import zmq.asyncio

from router.catalogue.client import CatalogueLine
from router.catalogue.holdings import Holdings
from router.catalogue.ledger import SharedLedger
from router.catalogue.server import SILENCE_S, CatalogueServer
from router.catalogue.wire import Beat, Expect, Seat, Taken
from router.errors import RateLimitError
from router.limits import Limits
from workers.curve import client_keys, server_keys, unlock
from workers.messages import Blocks

KEY = b"k" * 16
SECRET = b"s" * 32
WAIT_S = 10.0


@dataclass(slots=True)
class Seats:
    """Who is announced; tests change the list."""

    announced: list[Seat] = field(default_factory=list)

    async def catalogues(self) -> Sequence[Seat]:
        return self.announced


@dataclass(slots=True)
class Catalogue:
    """A running catalogue server and what it holds."""

    holdings: Holdings
    server: CatalogueServer
    seat: Seat


@asynccontextmanager
async def catalogue(name: str = "catalogue-0", node: str = "here") -> AsyncIterator[Catalogue]:
    now = asyncio.get_running_loop().time
    holdings = Holdings()
    holdings.follow("a", Blocks(0, stored=KEY, snapshot=True))
    server = CatalogueServer(
        "127.0.0.1", server_keys(SECRET), holdings, lambda: Beat(1, {"a": 1}, 0.0), now
    )
    task = asyncio.create_task(server.serve())
    try:
        yield Catalogue(holdings, server, Seat(name, name, server.address, node))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def line(seats: Seats, name: str = "ingress-0") -> AsyncIterator[CatalogueLine]:
    made = CatalogueLine(seats, name, "here", client_keys(SECRET), asyncio.get_running_loop().time)
    task = asyncio.create_task(made.watch())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool], _what: str) -> None:
    """Returns when it is true; `what` is for who reads the failure."""
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_answers_what_it_holds() -> None:
    """Found by the keys, and its beat says how much there is."""
    async with catalogue() as here, line(Seats([here.seat])) as asking:
        await until(lambda: asking.up, "an answer")
        found = await asking.look(KEY)
        assert found is not None
        assert found.depths == {"a": 1}
        assert asking.beat.blocks == {"a": 1}


async def test_two_lines_see_each_other_s_expectations() -> None:
    """And lose them when they are met, or when the other one is gone."""
    async with catalogue() as here, line(Seats([here.seat])) as one:
        async with line(Seats([here.seat]), "ingress-1") as other:
            await until(lambda: one.up and other.up, "two lines")
            other.expect(Expect("1", "b", 64, KEY))
            other.expect(Expect("2", "b", 32))
            other.met("2")
            assert await other.look(KEY) is not None  # in order: it was heard
            found = await one.look(KEY)
            assert found is not None
            assert found.depths == {"a": 1, "b": 1}
            assert found.taken == {"b": Taken(1, 1, 64)}
            mine = await other.look(KEY)
            assert mine is not None
            assert mine.taken == {}
        await until(lambda: len(here.server.ingresses()) == 1, "the other one to be dropped")
        found = await one.look(KEY)
        assert found is not None
        assert found.taken == {}


async def test_a_new_catalogue_is_told_what_is_expected() -> None:
    """One that restarts elsewhere is found, and knows what is still under way."""
    seats = Seats()
    async with line(seats) as asking, line(seats, "ingress-1") as other:
        async with catalogue("old") as old:
            seats.announced = [old.seat]
            await until(lambda: asking.up and other.up, "two lines")
            asking.expect(Expect("1", "b", 64, KEY))
        async with catalogue("new") as new:
            seats.announced = [new.seat]
            await until(lambda: len(new.server.ingresses()) == 2, "both to turn to the new one")
            await until(lambda: asking.up and other.up, "its beats")
            found = await other.look(KEY)
            assert found is not None
            assert found.taken == {"b": Taken(1, 1, 64)}


async def test_one_that_hangs_costs_a_bounded_wait_and_then_none() -> None:
    """A socket that takes questions and answers none: a look ends in time, and once silence is
    noticed at once."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    seat = Seat("mute", "mute", f"tcp://127.0.0.1:{port}", "here")
    async with catalogue() as here:
        seats = Seats([here.seat])
        async with line(seats) as asking:
            await until(lambda: asking.up, "an answer")
            here.server._socket.close()  # it is gone without a word
            now = asyncio.get_running_loop().time
            began = now()
            assert await asking.look(KEY) is None
            assert now() - began < 1.0
            seats.announced = [seat]
            await until(lambda: not asking.up, "its silence")
            began = now()
            assert await asking.look(KEY) is None
            assert now() - began < 0.05
    context.destroy(linger=0)


async def test_the_catalogue_of_the_own_node_is_preferred() -> None:
    """All ingresses of a node ask the same one; another node's serves where there is none."""
    async with catalogue("a", "elsewhere") as far, catalogue("b", "here") as near:
        for seats, chosen in (([far.seat, near.seat], near), ([far.seat], far)):
            async with line(Seats(list(seats))) as asking:
                await until(lambda: asking.up, "an answer")
                assert list(chosen.server.ingresses())


async def test_another_cluster_s_ingress_gets_nothing() -> None:
    """Without this cluster's keys nobody is told what is cached, or heard."""
    async with catalogue() as here:
        now = asyncio.get_running_loop().time
        stranger = CatalogueLine(Seats([here.seat]), "x", "here", client_keys(b"t" * 32), now)
        task = asyncio.create_task(stranger.watch())
        async with line(Seats([here.seat])) as known:
            await until(lambda: known.up, "who has the keys to be heard")
            await asyncio.sleep(1.0)
            assert not stranger.up
            assert len(here.server.ingresses()) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_bytes_that_are_no_message_end_nothing() -> None:
    """The catalogue drops them and goes on."""
    async with catalogue() as here, line(Seats([here.seat])) as asking:
        rogue = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        unlock(rogue, client_keys(SECRET))
        rogue.connect(here.seat.address)
        await rogue.send(b"\xff nonsense")
        await until(lambda: asking.up, "an answer")
        assert await asking.look(KEY) is not None
        rogue.close(linger=0)


LIMITS = Limits(max_requests=2, tokens_per_minute=6000)


async def test_two_ingresses_hold_a_tenant_to_one_limit() -> None:
    """Slots and tokens are counted over both; what one gives back the other may take."""
    now = asyncio.get_running_loop().time
    async with (
        catalogue() as here,
        line(Seats([here.seat])) as one,
        line(Seats([here.seat]), "ingress-1") as other,
    ):
        await until(lambda: one.up and other.up, "two lines")
        first, second = SharedLedger(one, now), SharedLedger(other, now)
        await first.enter("acme", LIMITS, "a")
        await second.enter("acme", LIMITS, "b")
        for ledger in (first, second):
            with pytest.raises(RateLimitError) as refused:
                await ledger.enter("acme", LIMITS, "c")
            ledger.leave("acme", LIMITS, "c", 0)
            assert refused.value.standing.refused == "requests"
        first.leave("acme", LIMITS, "a", 7000)
        assert await one.look(KEY) is not None  # in order: it was heard
        with pytest.raises(RateLimitError) as refused:
            await second.enter("acme", LIMITS, "d")
        assert refused.value.standing.refused == "tokens"
        await second.enter("other", LIMITS, "e")


async def test_a_lost_ingress_holds_no_slot() -> None:
    """What it had in flight ended with it."""
    now = asyncio.get_running_loop().time
    async with catalogue() as here, line(Seats([here.seat])) as one:
        await until(lambda: one.up, "an answer")
        async with line(Seats([here.seat]), "ingress-1") as other:
            await until(lambda: other.up, "an answer")
            for name in "ab":
                await SharedLedger(other, now).enter("acme", LIMITS, name)
            with pytest.raises(RateLimitError):
                await SharedLedger(one, now).enter("acme", LIMITS, "c")
        await until(lambda: len(here.server.ingresses()) == 1, "the other one to be dropped")
        standing = await SharedLedger(one, now).enter("acme", LIMITS, "c")
        assert standing.in_flight == 1


async def test_without_a_catalogue_an_ingress_counts_for_itself() -> None:
    """Limits hold on, with what it knows itself; a catalogue that comes back is told."""
    now = asyncio.get_running_loop().time
    seats = Seats()
    async with line(seats) as one, line(seats, "ingress-1") as other:
        ledger = SharedLedger(one, now)
        await ledger.enter("acme", LIMITS, "a")
        await ledger.enter("acme", LIMITS, "b")
        with pytest.raises(RateLimitError):
            await ledger.enter("acme", LIMITS, "c")
        async with catalogue() as here:
            seats.announced = [here.seat]
            await until(lambda: one.up and other.up, "two lines")
            with pytest.raises(RateLimitError):
                await SharedLedger(other, now).enter("acme", LIMITS, "d")
            ledger.leave("acme", LIMITS, "a", 10)
            assert await one.look(KEY) is not None
            await SharedLedger(other, now).enter("acme", LIMITS, "d")


@dataclass(slots=True)
class HangingSeats(Seats):
    """A directory that answers once and then never again."""

    asked: int = 0

    async def catalogues(self) -> Sequence[Seat]:
        self.asked += 1
        if self.asked > 1:
            await asyncio.Event().wait()
        return self.announced


async def test_a_directory_that_hangs_does_not_silence_the_line() -> None:
    """An ingress with nothing to ask is still known, and so is what it holds."""
    now = asyncio.get_running_loop().time
    async with catalogue() as here, line(HangingSeats([here.seat])) as asking:
        await until(lambda: asking.up, "an answer")
        await SharedLedger(asking, now).enter("acme", LIMITS, "a")
        await asyncio.sleep(SILENCE_S + 1.0)
        assert asking.up
        async with line(Seats([here.seat]), "ingress-1") as other:
            await until(lambda: other.up, "another line")
            standing = await SharedLedger(other, now).enter("acme", LIMITS, "b")
            assert standing.in_flight == 2


async def test_a_catalogue_that_dropped_an_ingress_is_told_anew() -> None:
    """What was in flight while nothing was heard is counted and debited when it is heard again."""
    now = asyncio.get_running_loop().time
    async with catalogue() as here, line(Seats([here.seat])) as asking:
        await until(lambda: asking.up, "an answer")
        ledger = SharedLedger(asking, now)
        await ledger.enter("acme", LIMITS, "a")
        asking.expect(Expect("1", "b", 64, KEY))
        asking._reconnect()  # as after a broken connection: another identity
        await until(lambda: len(here.server.ingresses()) == 2, "the new connection")
        async with line(Seats([here.seat]), "ingress-1") as other:
            await until(lambda: other.up, "another line")
            await until(lambda: len(here.server.ingresses()) == 2, "the old one to be dropped")
            found = await other.look(KEY)
            assert found is not None
            assert found.taken == {"b": Taken(1, 1, 64)}
            standing = await SharedLedger(other, now).enter("acme", LIMITS, "b")
            assert standing.in_flight == 2
            ledger.leave("acme", LIMITS, "a", 7000)
            assert await asking.look(KEY) is not None
            with pytest.raises(RateLimitError) as refused:
                await SharedLedger(other, now).enter("acme", LIMITS, "c")
            assert refused.value.standing.refused == "tokens"


async def test_a_dead_catalogue_s_record_does_not_win_over_the_living() -> None:
    """A record outlives its process; the one that fell silent is tried last."""
    dead = Seat("catalogue-0", "0dead", "tcp://127.0.0.1:9", "here")
    async with catalogue("9live") as live:
        living = Seat("catalogue-0", "9live", live.seat.address, "here")
        async with line(Seats([dead, living])) as asking:
            await until(lambda: asking.up, "the living one")
            assert list(live.server.ingresses())
