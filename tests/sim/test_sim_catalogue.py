"""Several ingresses and one catalogue, and an ingress whose catalogue is gone; virtual time."""

import asyncio
import random

import pytest

from kv.plan import Reason
from tests.sim.world import Prompts, answer, request, world

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

# The stated staleness: a question's way to the catalogue and back, and the beat of a report.
STALE_S = 0.005


async def test_what_one_ingress_computed_another_hits() -> None:
    """The catalogue is one: a prompt that came by either is found by both."""
    async with world(prefill=0, decode=3) as here, here.ingress("second").watching() as there:
        prompt = range(1000)
        await here.ask(request("first", prompt, 2))
        await here.quiet()
        await there.ask(request("again", prompt, 2))
        first, again = here.audit.records[-1], there.audit.records[-1]
        assert again.plan.decode == first.plan.decode
        assert again.cached_tokens() == 992


async def test_siblings_by_two_ingresses_meet_on_one_replica() -> None:
    """What one ingress has sent somewhere, another plans by, before any block is stored."""
    async with world(prefill=2, decode=2) as here, here.ingress("second").watching() as there:
        stem = list(range(1600))
        first = asyncio.create_task(here.ask(request("a", [*stem, 1], 2)))
        await asyncio.sleep(STALE_S)
        second = asyncio.create_task(there.ask(request("b", [*stem, 2], 2)))
        await asyncio.gather(first, second)
        one, other = here.audit.records[-1].plan, there.audit.records[-1].plan
        assert (one.prefill or one.decode) == (other.prefill or other.decode)


async def test_ingresses_do_not_pile_onto_one_replica() -> None:
    """Different prompts that come by two ingresses in turn are spread, though no replica has
    reported its new load yet."""
    async with world(prefill=2, decode=1) as here, here.ingress("second").watching() as there:
        asked = []
        for number, ingress in enumerate((here, there, here, there)):
            prompt = [number * 10_000 + i for i in range(1500)]
            asked.append(asyncio.create_task(ingress.ask(request(f"r{number}", prompt, 1))))
            await asyncio.sleep(STALE_S)
        await asyncio.gather(*asked)
        records = [*here.audit.records, *there.audit.records]
        chosen = [record.plan.prefill for record in records if record.plan.prefill]
        assert chosen.count("prefill-0") == chosen.count("prefill-1") == len(asked) // 2


async def test_without_the_catalogue_requests_are_served_and_say_so() -> None:
    """Nothing is lost but hits; the reason names what is missing, and goes when it is back."""
    async with world() as here:
        prompt = range(1000)
        await here.ask(request("before", prompt, 2))
        await here.quiet()
        here.line.down = True
        asked = request("blind", prompt, 5)
        assert await here.ask(asked) == answer(asked)
        blind = here.audit.records[-1]
        assert blind.plan.reason is Reason.NO_CATALOGUE
        assert blind.plan.spans[0].start_token == 0
        here.line.down = False
        await here.quiet()
        await here.ask(request("after", prompt, 2))
        assert here.audit.records[-1].plan.reason is not Reason.NO_CATALOGUE
        assert here.audit.records[-1].cached_tokens() == 992


async def test_a_catalogue_that_comes_and_goes_harms_no_request() -> None:
    """Two ingresses, 300 requests, a line that is down at random: all answers are right and
    nothing stays expected."""
    async with world() as here, here.ingress("second").watching() as there:
        rng = random.Random(5)
        prompts = Prompts(rng)

        async def one(number: int) -> None:
            await asyncio.sleep(rng.random() * 60)
            asked = prompts.next(f"r{number}")
            assert await rng.choice((here, there)).ask(asked) == answer(asked)

        async def flicker() -> None:
            for _ in range(60):
                await asyncio.sleep(1.0)
                rng.choice((here, there)).line.down = rng.random() < 0.3
            here.line.down = there.line.down = False

        await asyncio.gather(flicker(), *(one(number) for number in range(300)))
        await here.quiet()
        here.check()
        there.check()
