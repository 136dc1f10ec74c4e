"""The simulator behaves at its links as a real replica does."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from kv.block import pack_tokens
from tests.contract.link_behaviour import BEHAVIOURS, Stage
from workers.messages import Role
from workers.sim import SimCluster, SimCosts, sim_body, sim_replica


def prompt(number: int) -> bytes:
    return pack_tokens(range(1000 * number, 1000 * number + 100))


@pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)
@pytest.mark.parametrize(
    "costs", [SimCosts(), SimCosts(host_blocks=4096)], ids=["handoffs", "tiers"]
)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
async def test_the_simulator_keeps_the_contract(
    behaviour: Callable[[Stage], Awaitable[None]], costs: SimCosts
) -> None:
    """Each behaviour holds on virtual time, and the books balance afterwards."""
    async with asyncio.timeout(600), SimCluster() as cluster:
        prefill, decode = (
            cluster.start(sim_replica(f"{role}-0", role, costs), costs) for role in Role
        )
        sides = (partial(engine.connect, follow=True) for engine in (prefill, decode))
        await behaviour(Stage(*sides, prompt, sim_body, sim_body))
        for engine in (prefill, decode):
            engine.check_integrity()
