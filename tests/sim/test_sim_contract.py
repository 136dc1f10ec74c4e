"""The simulator behaves at its links as a real replica does."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from kv.block import pack_tokens
from kv.curve import LinkCurve
from tests.contract.link_behaviour import BEHAVIOURS, LENDING, Stage
from workers.messages import Role
from workers.sim import SimCluster, SimCosts, sim_body, sim_replica

HANDOFFS, TIERS = SimCosts(), SimCosts(host_blocks=4096)
LENDERS = replace(TIERS, lends=True)
WITH_VAULT = replace(LENDERS, vault=LinkCurve(0.02, 2e-9))


def prompt(number: int) -> bytes:
    return pack_tokens(range(1000 * number, 1000 * number + 100))


@pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)
@pytest.mark.parametrize(
    ("costs", "behaviour"),
    [
        *product((HANDOFFS, TIERS), BEHAVIOURS),
        *product((LENDERS, WITH_VAULT), (*BEHAVIOURS, *LENDING)),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
async def test_the_simulator_keeps_the_contract(
    costs: SimCosts, behaviour: Callable[[Stage], Awaitable[None]]
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
