"""A request that allows a lossy codec, over replicas that have its prompt under other names."""

import asyncio
from dataclasses import replace

import pytest

from kv.block import pack_tokens
from kv.codecs.codec import CodecName
from kv.plan import Reason, Source
from router.context import RequestContext
from router.request import Names, Request
from tests.sim.world import World, world
from workers.messages import Keep
from workers.sim import sim_answer, sim_body

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)
PROMPT = pack_tokens(range(800))
EXACT, LOSSY = Names(None, sim_body(5), None), Names("l", sim_body(5, "l"), Keep(CodecName.INT8))


def asking(name: str, names: Names, exact: Names | None = None) -> Request:
    context = RequestContext(name)
    return Request(name, PROMPT, names.body, names.salt, context, keep=names.keep, exact=exact)


async def answered(here: World, request: Request) -> list[int]:
    tokens = await here.ask(request)
    await here.quiet()
    return tokens


def hit_tokens(here: World) -> int:
    spans = here.audit.records[-1].plan.spans
    return sum(s.end_token - s.start_token for s in spans if s.source is Source.HIT)


async def test_exact_blocks_are_used_where_there_are_no_others() -> None:
    """A prompt that is cached exactly is a hit for a request that allows a codec, and never the
    other way round."""
    async with world(prefill=0, decode=1) as here:
        await answered(here, asking("first", EXACT))
        assert await answered(here, asking("second", LOSSY, EXACT)) == sim_answer(PROMPT, 5)
        assert here.audit.records[-1].plan.reason is Reason.EXACT_NAMES
        assert hit_tokens(here) > 700


async def test_the_codec_s_own_names_come_first() -> None:
    """Where neither is cached, or both are, the request runs under the codec's names; what it
    leaves there is not found by exact requests."""
    async with world(prefill=0, decode=1) as here:
        for number in range(2):
            await answered(here, asking(f"lossy-{number}", LOSSY, EXACT))
            assert here.audit.records[-1].plan.reason is not Reason.EXACT_NAMES
        assert hit_tokens(here) > 700
        await answered(here, asking("exact", EXACT))
        assert hit_tokens(here) == 0
        await answered(here, asking("both", LOSSY, EXACT))
        assert here.audit.records[-1].plan.reason is not Reason.EXACT_NAMES


async def test_a_stream_goes_on_under_the_names_that_it_began_with() -> None:
    """Whoever takes it over is asked under the same names, though by then others would be
    cheaper there."""
    long = replace(EXACT, body=sim_body(300))
    lossy = replace(LOSSY, body=sim_body(300, "l"))
    async with world(prefill=0, decode=2) as here:
        await answered(here, asking("first", long))
        [warm] = {record.plan.decode for record in here.audit.records}
        streaming = asyncio.create_task(here.ask(asking("second", lossy, long)))
        await asyncio.sleep(0.5)
        record = here.audit.records[-1]
        assert (record.plan.decode, record.plan.reason) == (warm, Reason.EXACT_NAMES)
        here.engine(warm).crash()
        assert await streaming == sim_answer(PROMPT, 300)
        assert [plan.reason for plan in record.plans] == [Reason.EXACT_NAMES, Reason.DECODE_LOST]
        other = next(name for name in here.cluster.engines if name != warm)
        assert here.fleet.cached_blocks(here.fleet.roster.by_name[other]) > 0
        await answered(here, asking("third", long))
        assert hit_tokens(here) > 700
