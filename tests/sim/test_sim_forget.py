"""A tenant is forgotten while its requests are anywhere in the cluster."""

import asyncio
import random

import pytest

from kv.block import chain, pack_tokens, root_key, split_keys
from router.context import RequestContext
from router.forget import forget
from router.request import Request
from tests.sim.world import World, world
from workers.sim import sim_answer, sim_body

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)
ACME, OTHER = "aa.11", "bb.22"
BLOCK_TOKENS = 16


def _request(name: str, token_ids: list[int], salt: str, n_tokens: int) -> Request:
    tokens = pack_tokens(token_ids)
    return Request(name, tokens, sim_body(n_tokens, salt), salt, RequestContext(name))


def _cached(made: World) -> set[bytes]:
    engines = made.cluster.engines.values()
    return {key for engine in engines for key in split_keys(engine.cached())}


@pytest.mark.parametrize("seed", range(12))
async def test_what_was_asked_before_is_found_nowhere_afterwards(seed: int) -> None:
    """Requests of two tenants arrive for a second; one tenant is forgotten in the middle of them,
    when some wait, compute, cross or stream. Every answer is right. At rest no block of the
    forgotten tenant is left on any replica, and the other's are."""
    rng = random.Random(seed)
    async with world(prefill=2, decode=2) as made:
        stems = [[rng.randrange(32_000) for _ in range(rng.randrange(64, 900))] for _ in range(6)]
        sent: list[Request] = []

        async def send(number: int) -> None:
            salt = rng.choice((ACME, OTHER))
            prompt = rng.choice(stems) + [
                rng.randrange(32_000) for _ in range(rng.randrange(1, 60))
            ]
            wanted = rng.randrange(1, 30)
            asked = _request(f"r{number}", prompt, salt, wanted)
            delay_s = rng.uniform(0.0, 1.0)
            sent.append(asked)
            await asyncio.sleep(delay_s)
            assert await made.ask(asked) == sim_answer(asked.tokens, wanted)

        async with asyncio.TaskGroup() as tasks:
            for number in range(40):
                tasks.create_task(send(number))
            await asyncio.sleep(1.0 + rng.uniform(0.0, 0.5))
            outcomes = await forget(made.fleet.members(), ("aa",))
        assert all(outcome.complaint is None for outcome in outcomes)
        await made.quiet()
        made.check()
        keys: dict[str | None, set[bytes]] = {ACME: set(), OTHER: set()}
        for asked in sent:
            keys[asked.salt].update(chain(root_key(asked.salt), asked.tokens, BLOCK_TOKENS))
        cached = _cached(made)
        assert not cached & keys[ACME]
        assert cached & keys[OTHER]
