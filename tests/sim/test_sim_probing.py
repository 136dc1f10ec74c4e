"""Curves measured on request, and told."""

import random
from dataclasses import replace
from typing import Any

import pytest

from router.curves import curves_of
from router.probing import LENGTHS_TOKENS, Probing
from tests.sim.world import COSTS, World, world
from workers.sim import sim_body

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


def probing(here: World) -> Probing:
    return Probing(here.fleet, sim_body(1), random.Random(1), here.now)


async def test_everything_is_measured_and_nothing_is_left_behind() -> None:
    """Each decode replica computes and each pair hands off, once for each length."""
    async with world(prefill=2, decode=2) as here:
        counted = await probing(here).probe(300.0)
        assert counted == {
            "computed": 2 * len(LENGTHS_TOKENS),
            "handed_off": 4 * len(LENGTHS_TOKENS),
        }
        told = curves_of(here.fleet, points=True)
        for row in told["prefill"].values():
            assert row["samples"] == len(row["points"]) >= len(LENGTHS_TOKENS)
            assert row["per_token_s"] == pytest.approx(COSTS.prefill.per_token_s, rel=0.1)
        for row in told["links"].values():
            assert row["samples"] == len(row["points"]) == len(LENGTHS_TOKENS)
        await here.quiet()
        here.check()


async def test_what_does_not_fit_into_the_time_is_left_out() -> None:
    """Short prompts come first."""
    async with world(prefill=0, decode=1) as here:
        began = here.now()
        counted = await probing(here).probe(0.5)
        assert here.now() - began <= 0.6
        assert counted["computed"] >= 2
        assert counted["skipped"] >= 1
        assert counted.total() == len(LENGTHS_TOKENS)


async def test_prompts_that_are_refused_are_left_out() -> None:
    """A model with a short context; what was read of none is given back."""
    async with world(prefill=1, decode=1, kv_blocks=40) as here:  # of 16 tokens
        counted = await probing(here).probe(300.0)
        assert counted == {"computed": 3, "handed_off": 3, "skipped": 4}
        await here.quiet()
        here.check()


async def test_curves_are_told_with_their_crossovers() -> None:
    """Tokens from which on a handed-off prefix costs its receiver no more than computing it."""
    async with world(prefill=1, decode=1, costs=replace(COSTS, host_blocks=4096)) as here:
        told: dict[str, Any] = curves_of(here.fleet)
        assert set(told) == {"prefill", "links", "tiers"}
        assert told["prefill"]["decode-0"]["samples"] == 0
        link = told["links"]["prefill-0->decode-0"]
        seconds = link["latency_s"] + link["crossover_tokens"] * 46_080 / link["bytes_per_s"]
        curve = here.fleet.members()[0].speed.curve
        assert seconds == pytest.approx(curve.seconds(round(link["crossover_tokens"]), 0), rel=0.1)
        assert told["tiers"]["decode-0"]["host"]["crossover_tokens"] == 0.0
        assert "points" not in link
