"""What tests over the simulator rely on, beyond the contract that it shares with real replicas."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from kv.block import pack_tokens, split_keys
from workers.messages import Delta, Reply, Role, Step, Submit
from workers.sim import SimCluster, SimCosts, SimEngine, sim_answer, sim_body, sim_replica
from workers.sim_pages import Grant, Pages

COSTS = SimCosts(lease_s=30.0)
A, B, C = (name * 16 for name in (b"a", b"b", b"c"))
virtual_time = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


@dataclass(slots=True)
class Told:
    """Deltas by request, each with the time it came."""

    deltas: dict[str, list[tuple[float, Delta]]] = field(default_factory=dict)

    def receive(self, reply: Reply) -> None:
        now_s = asyncio.get_running_loop().time()
        for delta in reply.deltas if isinstance(reply, Step) else ():
            self.deltas.setdefault(delta.request_id, []).append((now_s, delta))

    def tokens(self, name: str) -> list[int]:
        return [t for _, delta in self.deltas.get(name, ()) for t in delta.token_ids]

    def gaps_s(self, name: str) -> list[float]:
        times = [at for at, _ in self.deltas[name]]
        return [round(b - a, 3) for a, b in pairwise(times)]


@asynccontextmanager
async def two_engines() -> AsyncIterator[tuple[SimEngine, SimEngine]]:
    """A prefill and a decode replica. No fixture: those run outside of virtual time."""
    async with asyncio.timeout(600), SimCluster() as cluster:
        prefill, decode = (cluster.start(sim_replica(role, role, COSTS), COSTS) for role in Role)
        yield prefill, decode


def prompt(first: int, n_tokens: int = 100) -> bytes:
    return pack_tokens(range(first, first + n_tokens))


@virtual_time
async def test_another_prompt_s_kv_gives_wrong_tokens() -> None:
    """A router that mixes handoffs up is caught by its tokens."""
    async with two_engines() as (prefill, decode):
        told = Told()
        prefill.connect(told).send(Submit("p", Role.PREFILL, prompt(0), sim_body(1)))
        await asyncio.sleep(1.0)
        handoff = told.deltas["p"][-1][1].handoff
        decode.connect(told).send(Submit("d", Role.DECODE, prompt(500), sim_body(4), handoff))
        await asyncio.sleep(1.0)
        assert told.tokens("d") == sim_answer(prompt(0), 4) != sim_answer(prompt(500), 4)


@virtual_time
async def test_a_lease_that_nobody_reads_ends_by_itself() -> None:
    """After `lease_s` the pages are back, the expiry counts, and the handoff is void."""
    async with two_engines() as (prefill, decode):
        told = Told()
        prefill.connect(told).send(Submit("p", Role.PREFILL, prompt(0), sim_body(1)))
        await asyncio.sleep(29.0)
        assert prefill.load().leased == 1
        await asyncio.sleep(2.0)
        assert (prefill.load().leased, prefill.load().kv_usage) == (0, 0.0)
        assert prefill.load().totals.expired_leases == 1
        handoff = told.deltas["p"][-1][1].handoff
        decode.connect(told).send(Submit("d", Role.DECODE, prompt(0), sim_body(4), handoff))
        await asyncio.sleep(1.0)
        assert told.tokens("d") == sim_answer(prompt(0), 4)
        assert decode.load().totals.failed_transfers == 1


@virtual_time
async def test_a_prefill_stalls_the_streams_beside_it() -> None:
    """One gap of a running stream is as long as the prefill, the others are steps."""
    async with two_engines() as (_, decode):
        told = Told()
        link = decode.connect(told)
        link.send(Submit("stream", Role.DECODE, prompt(0), sim_body(60)))
        await asyncio.sleep(0.5)
        link.send(Submit("long", Role.DECODE, prompt(500, 1000), sim_body(2)))
        await asyncio.sleep(5.0)
        stall_s = round(COSTS.prefill.seconds(1000, 0), 3)
        assert sorted(told.gaps_s("stream")) == [COSTS.step_s] * 58 + [stall_s]


@virtual_time
async def test_a_crashed_engine_says_nothing_and_a_hung_one_later() -> None:
    """What was asked of a hung engine is answered when it goes on; a crash is for ever."""
    async with two_engines() as (prefill, decode):
        told = Told()
        links = [engine.connect(told) for engine in (prefill, decode)]
        await asyncio.sleep(1.0)
        prefill.crash()
        decode.hang()
        for name, link in zip(("p", "d"), links, strict=True):
            link.send(Submit(name, Role.DECODE, prompt(0), sim_body(4)))
        await asyncio.sleep(5.0)
        assert told.deltas == {}
        decode.resume()
        await asyncio.sleep(5.0)
        assert (told.tokens("d"), told.tokens("p")) == (sim_answer(prompt(0), 4), [])


def published(pages: Pages, *keys: bytes) -> Grant:
    """Pages of a request that has just computed these blocks."""
    grant = pages.grant((), len(keys))
    assert grant is not None
    pages.publish(grant, keys)
    return grant


def test_the_block_that_was_held_longest_ago_goes_first() -> None:
    """A block that is found again is young again; one that is held never goes."""
    pages = Pages(3)
    for key in (A, B, C):
        pages.release(published(pages, key))
    found = pages.grant([A], 0)
    assert found is not None
    pages.release(found)
    grant = pages.grant([], 1)
    assert split_keys(pages.snapshot()) == [A, C]
    assert pages.grant([C], 2) is None
    pages.check([grant] if grant else [])


def test_changes_are_net() -> None:
    """What came and went is no news; what was told is told to be gone."""
    pages = Pages(2)
    pages.release(published(pages, A, B))
    assert set(split_keys(pages.take().stored)) == {A, B}
    pages.release(published(pages, C))
    pages.clear()
    change = pages.take()
    assert (change.stored, set(split_keys(change.removed))) == (b"", {A, B})


def test_pages_that_nobody_was_granted_are_an_error() -> None:
    """A leak and a page held twice both unbalance the books."""
    pages = Pages(8)
    grant = published(pages, A, B)
    pages.check([grant])
    for wrong in ([], [grant, grant], [Grant([A, B], 1)], [Grant([A])]):
        with pytest.raises(RuntimeError, match="granted"):
            pages.check(wrong)
