"""Every policy serves every request right, through failures and changes of policy too."""

import asyncio
import random
from collections.abc import Mapping

import pytest

from kv.plan import Plan, Reason, Shape
from router.orders import Order
from router.policy import Policy
from router.policy.question import Question
from router.policy.registry import CHOOSE, Choose
from router.shadow import Outcome
from tests.sim.test_sim_world import ask_all, crash_often, fault_often, on_a_new_loop, ordered
from tests.sim.world import Prompts, World, answer, request, world
from workers.messages import Role

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

OTHERS = [policy for policy in Policy if policy is not Policy.BREAKEVEN]
REASONS = {
    Policy.LEAST_LOADED: Reason.LEAST_LOADED,
    Policy.PREFIX_AFFINITY: Reason.PREFIX_AFFINITY,
    Policy.ROUND_ROBIN: Reason.ROUND_ROBIN,
    Policy.THRESHOLD: Reason.THRESHOLD,
    Policy.ALWAYS_FETCH: Reason.ALWAYS_FETCH,
    Policy.ALWAYS_COMPUTE: Reason.ALWAYS_COMPUTE,
}
LOST = {Reason.PREFILL_LOST, Reason.DECODE_LOST}


@pytest.mark.parametrize("policy", OTHERS)
@pytest.mark.parametrize("prefill", [0, 2])
async def test_any_policy_answers_right_through_crashes(policy: Policy, prefill: int) -> None:
    """300 requests while decode and prefill replicas crash and come back: every answer right,
    every plan by that policy or by what was lost, and nothing left held."""
    rng = random.Random(11)
    prompts = Prompts(rng)
    async with world(prefill=prefill, order=Order(policy)) as here:
        crashing = [asyncio.create_task(crash_often(here, rng, Role.DECODE, 3))]
        if prefill:
            crashing.append(asyncio.create_task(crash_often(here, rng, Role.PREFILL, prefill)))
        asked = [prompts.next(f"r{i}") for i in range(300)]
        assert await ask_all(here, rng, asked, 40.0) == [answer(one) for one in asked]
        await asyncio.gather(*crashing)
        firsts = {record.plans[0].reason for record in here.audit.records}
        followers = {plan.reason for record in here.audit.records for plan in record.plans[1:]}
        assert firsts == {REASONS[policy]}
        assert followers
        assert followers <= LOST
        await here.warmed()
        here.check()


@pytest.mark.parametrize("policy", OTHERS)
async def test_any_policy_leaves_nothing_behind_after_all_faults(policy: Policy) -> None:
    """Crashes, hangs and refusals together: what is answered is right, and books balance."""
    rng = random.Random(21)
    prompts = Prompts(rng)
    async with world(order=Order(policy)) as here:
        faults = asyncio.create_task(fault_often(here, rng))
        asked = [prompts.next(f"r{i}") for i in range(300)]
        outcomes = await ask_all(here, rng, asked, 40.0)
        await faults
        right = [got == answer(one) for got, one in zip(outcomes, asked, strict=True)]
        failed = [isinstance(got, BaseException) for got in outcomes]
        assert all(a or b for a, b in zip(right, failed, strict=True))
        assert sum(right) > 250
        await asyncio.sleep(45.0)  # leases of handoffs that crossed a crash
        await here.warmed()
        here.check()


async def test_the_kill_switch_works_under_load() -> None:
    """Each request is planned by the policy that is in force as it comes; those under way go on."""
    rng = random.Random(31)
    prompts = Prompts(rng)
    async with world() as here:
        asked = [prompts.next(f"r{i}") for i in range(400)]
        turned_at = {}

        def turn(policy: Policy) -> None:
            here.order = Order(policy)
            turned_at[policy] = here.now()

        loop = asyncio.get_running_loop()
        began = here.now()
        loop.call_later(10.0, turn, Policy.LEAST_LOADED)
        loop.call_later(30.0, turn, Policy.BREAKEVEN)
        assert await ask_all(here, rng, asked, 40.0) == [answer(one) for one in asked]
        for record in ordered(here, asked):
            killed = 10.0 <= record.started_at - began < 30.0
            assert (record.plan.reason is Reason.LEAST_LOADED) == killed
        await here.quiet()
        here.check()


async def test_least_loaded_spreads_a_burst_evenly() -> None:
    """Nobody holds two more requests than another, however much one of them has cached."""
    async with world(prefill=0, decode=3, order=Order(Policy.LEAST_LOADED)) as here:
        asked = [request(f"r{i}", range(600), 20) for i in range(12)]
        await ask_all(here, random.Random(0), asked, 0.0)
        used = [record.plan.decode for record in here.audit.records]
        assert {used.count(f"decode-{i}") for i in range(3)} == {4}


def failing(_: Question) -> Plan:
    raise ZeroDivisionError("of a policy on trial")


async def plans_with(order: Order, shadows: Mapping[Policy, Choose]) -> tuple[World, list[str]]:
    """A world that served 200 requests, and the headers of their plans with their TTFT."""
    rng = random.Random(41)
    prompts = Prompts(rng)
    async with world(order=order, shadows=shadows) as here:
        asked = [prompts.next(f"r{i}") for i in range(200)]
        assert await ask_all(here, rng, asked, 20.0) == [answer(one) for one in asked]
        records = ordered(here, asked)
        return here, [f"{record.plan.header()} {record.ttft_s}" for record in records]


@pytest.mark.parametrize("shadows", [None, {Policy.ROUND_ROBIN: failing}], ids=["sound", "raises"])
def test_a_shadow_changes_nothing(shadows: dict[Policy, Choose] | None) -> None:
    """With a shadow, even one that raises, every plan and every TTFT is what it is without."""
    shadowed = Order(shadow=Policy.ROUND_ROBIN)
    _, alone = on_a_new_loop(plans_with(Order(), CHOOSE))
    here, beside = on_a_new_loop(plans_with(shadowed, shadows or CHOOSE))
    assert beside == alone
    tally = here.shadow.tallies[Policy.BREAKEVEN, Policy.ROUND_ROBIN]
    assert tally.outcomes.total() == len(alone)
    assert (tally.outcomes[Outcome.FAILED] == len(alone)) == (shadows is not None)
    for record in here.audit.records:
        assert record.shadow is not None
        local = record.plan.shape is Shape.LOCAL
        assert shadows or (record.shadow.outcome is Outcome.SHAPE) == local


async def test_a_shadow_answers_behind_the_request() -> None:
    """When the shadow plans, the request has been sent to its replica: it waits for nothing."""
    under_way = []

    def note(question: Question) -> Plan:
        under_way.append(sum(member.requests for member in here.fleet.members()))
        return CHOOSE[Policy.LEAST_LOADED](question)

    order = Order(shadow=Policy.LEAST_LOADED)
    async with world(order=order, shadows={Policy.LEAST_LOADED: note}) as here:
        for number in range(3):
            asked = request(f"r{number}", range(number, 600), 3)
            assert await here.ask(asked) == answer(asked)
    assert under_way == [1, 1, 1]
