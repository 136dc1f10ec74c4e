"""A planner that explores, over a fleet that runs."""

import asyncio
import random
from dataclasses import replace

import pytest

from kv.plan import Reason
from router.explorer import Explorer
from router.planner import Planner, Prices
from tests.sim.world import request, world

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


async def test_each_replica_is_tried_and_then_left() -> None:
    """Of three idle replicas the first is the cheapest: the others are tried once each, and a
    request that a replica has failed is not experimented with, nor is one that gives way."""
    async with world(prefill=0, decode=3) as here:
        now = asyncio.get_running_loop().time
        explorer = Explorer(1.0, now, random.Random(5))
        planner = Planner(here.fleet, Prices(), explorer=explorer)
        again = (await planner.plan(request("again", range(500), 2), avoid={"decode-0"}))[1].plan
        assert again.reason is not Reason.EXPLORED
        for number in range(40):
            batch = replace(request(f"b{number}", range(500), 2), patient_until_s=now() + 60.0)
            plan = (await planner.plan(batch))[1].plan
            assert plan.reason is not Reason.EXPLORED
        plans = [
            (await planner.plan(request(f"r{number}", range(500), 2)))[1].plan
            for number in range(40)
        ]
        explored = [plan.decode for plan in plans if plan.reason is Reason.EXPLORED]
        assert len(explored) == len(set(explored))
        assert {*explored, again.decode} == {"decode-1", "decode-2"}
