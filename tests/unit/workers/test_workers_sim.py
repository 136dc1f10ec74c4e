"""What tests over the simulator rely on, beyond the contract that it shares with real replicas."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from msgspec.structs import replace

from kv.block import chain, pack_tokens, root_key, split_keys
from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.plan import Hints
from workers.messages import Delta, Keep, Reply, Role, Step, Submit
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


@virtual_time
async def test_a_head_is_lent_as_it_is_computed() -> None:
    """Block by block, none before its time: 0.1 s a chunk of ten. While it gives way to another
    prompt, what its chunks computed is there, and it has not ended."""
    costs = SimCosts(host_blocks=1000, lends=True, chunk_tokens=160)
    tokens = prompt(0, 800)
    keys = chain(root_key(None), tokens, 16)
    async with asyncio.timeout(600), SimCluster() as cluster:
        engine = cluster.start(sim_replica("p", Role.PREFILL, costs), costs)
        link, began_s = engine.connect(Told()), asyncio.get_running_loop().time()
        head = Submit("head", Role.PREFILL, tokens, sim_body(1), lends=True)
        link.send(replace(head, keep=Keep(yields=True), patience_s=60.0))

        async def here(at_s: float) -> int:
            await asyncio.sleep(began_s + at_s - asyncio.get_running_loop().time())
            lent = engine.lent("head", keys)
            assert lent is not None
            assert not lent.ended
            assert lent.here == tuple(keys[: len(lent.here)])
            return len(lent.here)

        assert [await here(at_s) for at_s in (0.01, 0.08, 0.15)] == [0, 7, 13]
        link.send(Submit("urgent", Role.PREFILL, prompt(5000, 1000), sim_body(1)))
        assert await here(0.5) == 20
        await asyncio.sleep(2.0)
        lent = engine.lent("head", keys)
        assert lent is not None
        assert lent.ended
        assert lent.here == tuple(keys)


@virtual_time
@pytest.mark.parametrize("yields", [False, True])
async def test_what_yields_displaces_nothing_in_tiers(yields: bool) -> None:
    """Another replica has all ten blocks of a prompt. A host tier that has room for four takes five
    of them in, half of what it holds; four for a request that yields, of which the vault gets
    none."""
    lender = SimCosts(host_blocks=1000, lends=True)
    costs = SimCosts(host_blocks=10, lends=True, vault=LinkCurve(0.02, 2e-9))
    tokens = prompt(5000, 160)
    async with asyncio.timeout(600), SimCluster() as cluster:
        prefill = cluster.start(sim_replica("p", Role.PREFILL, lender), lender)
        decode = cluster.start(sim_replica("d", Role.DECODE, costs), costs)
        told = Told()
        prefill.connect(told).send(Submit("p", Role.PREFILL, tokens, sim_body(1)))
        link = decode.connect(told)
        link.send(Submit("stays", Role.DECODE, prompt(0), sim_body(1)))
        await asyncio.sleep(1.0)
        assert {tier: each.blocks for tier, each in decode.load().tiers.items()} == {
            Tier.HOST: 6,
            Tier.VAULT: 6,
        }
        hints = Hints(159, (Tier.PEER,), 10.0, prefill.replica.peer_address)
        asked = Submit("d", Role.DECODE, tokens, sim_body(1), hints=hints)
        if yields:
            asked = replace(asked, keep=Keep(yields=True), patience_s=60.0)
        link.send(asked)
        await asyncio.sleep(1.0)
        [(_, delta)] = told.deltas["d"]
        assert delta.sources is not None
        fetched = 64 if yields else 80
        assert delta.sources.by_source() == {"peer": fetched, "computed": 160 - fetched}
        assert decode.load().tiers[Tier.VAULT].blocks == (6 if yields else 16)


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
