"""Who is routable when the directory lags, lies or fails, and when replicas stop."""

import asyncio
import random
from dataclasses import replace
from typing import cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from kv.curve import PrefillCurve
from router.errors import NoReplicaError
from router.metrics import FleetMetrics
from router.pool_metrics import PoolMetrics
from router.vault import ShardDirectory, VaultView
from tests.sim.world import COSTS, World, answer, request, world
from workers.messages import Role

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)


async def test_a_directory_that_hangs_delays_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a read of the directory hangs, silence is still noticed within seconds."""
    async with world() as here:

        async def never() -> None:
            await asyncio.sleep(3000)

        monkeypatch.setattr(here.directory, "replicas", never)
        await asyncio.sleep(2.0)
        here.engine("prefill-0").crash()
        await asyncio.sleep(6.0)
        assert here.fleet.member("prefill-0") is None


async def test_a_replica_that_answers_stays_though_its_record_is_gone() -> None:
    """A directory that loses records ends no stream: the channel decides who is alive."""
    async with world(prefill=0, decode=1) as here:
        asked = request("r", range(40), 200)
        asking = asyncio.create_task(here.ask(asked))
        await asyncio.sleep(0.5)
        here.directory.announced.clear()
        assert await asking == answer(asked)


async def test_two_engines_of_one_name_are_both_routable() -> None:
    """While a stopping engine keeps its name, a new one of that name is known apart from it:
    neither pushes the other out."""
    async with world(prefill=0, decode=1) as here:
        newer = msgspec.structs.replace(
            here.directory.announced["decode-0"], epoch="feed/2", address="sim://other"
        )
        here.cluster.start(msgspec.structs.replace(newer, name="decode-0.feed"), here.costs)
        here.directory.announced["another"] = newer
        await asyncio.sleep(3.0)
        assert [m.name for m in here.fleet.up(Role.DECODE)] == ["decode-0", "decode-0.feed"]
        await asyncio.sleep(10.0)
        assert [m.name for m in here.fleet.up(Role.DECODE)] == ["decode-0", "decode-0.feed"]


async def test_a_record_that_cannot_be_priced_is_skipped() -> None:
    """A replica that measured nothing is not routable, and the others go on."""
    async with world() as here:
        strange = msgspec.structs.replace(
            here.directory.announced["prefill-0"], name="strange", epoch="x", prefill_samples=()
        )
        here.directory.announced["strange"] = strange
        await asyncio.sleep(3.0)
        assert here.fleet.member("strange") is None
        asked = request("r", range(400), 5)
        assert await here.ask(asked) == answer(asked)


async def test_without_replicas_the_status_can_still_be_sent() -> None:
    """`check`, asked before a response is begun, refuses as `serve` would."""
    async with world(prefill=0, decode=1) as here:
        here.pipeline.check(1)
        here.engine("decode-0").crash()
        await asyncio.sleep(6.0)
        with pytest.raises(NoReplicaError):
            here.pipeline.check(1)


async def test_sums_of_counters_never_fall() -> None:
    """Whatever hangs, restarts or leaves, the cluster's counters only grow."""
    async with world() as here:
        collector = FleetMetrics(here.fleet)
        CollectorRegistry().register(collector)
        seen = 0.0
        for number in range(6):
            asked = request(f"r{number}", range(number * 1000, number * 1000 + 400), 3)
            assert await here.ask(asked) == answer(asked)
            await asyncio.sleep(2.0)
            seen = _not_less(collector, seen)
            await _disturb(here, number)
            seen = _not_less(collector, seen)
        assert seen >= 6 * 400


async def test_a_replica_that_was_away_is_counted_once() -> None:
    """One that hung for so long that its record was void comes back with all that it had counted:
    what was kept of it is not added to that."""
    async with world() as here:
        collector = FleetMetrics(here.fleet)
        asked = request("r", range(400), 3)
        assert await here.ask(asked) == answer(asked)
        await asyncio.sleep(2.0)
        counted = _not_less(collector, 400)
        hung = here.directory.announced.pop("decode-0")
        here.engine("decode-0").hang()
        await asyncio.sleep(15.0)
        assert here.fleet.member("decode-0") is None
        assert _not_less(collector, counted) == counted
        here.directory.announced["decode-0"] = hung
        here.engine("decode-0").resume()
        await here.warmed()
        await asyncio.sleep(3.0)
        every = [here.engine(name).load().totals for name in here.directory.announced]
        computed = sum(each.prompt_tokens_computed + each.prompt_tokens_device for each in every)
        assert _not_less(collector, counted) == computed


async def test_a_pool_tells_how_many_it_lacks() -> None:
    """A dead replica's own series ends with it: pools have one each, down to none."""
    async with world(prefill=1, decode=1) as here:
        vault = VaultView(cast(ShardDirectory, None))
        metrics = PoolMetrics(here.fleet, vault, {"prefill": 1, "decode": 1, "vault": 2})

        def told(name: str) -> dict[str, float]:
            [found] = [each for each in metrics.collect() if each.name.endswith(name)]
            return {sample.labels["role"]: sample.value for sample in found.samples}

        assert told("wanted") == {"prefill": 1, "decode": 1, "vault": 2}
        assert told("up") == {"prefill": 1, "decode": 1, "vault": 0}
        here.engine("decode-0").crash()
        await asyncio.sleep(6.0)
        assert told("up") == {"prefill": 1, "decode": 0, "vault": 0}


async def _disturb(here: World, number: int) -> None:
    name = f"decode-{number % 2}"
    if number % 3 == 0:
        here.engine(name).hang()
        await asyncio.sleep(5.0)
        here.engine(name).resume()
    else:
        here.engine(name).crash()
        await asyncio.sleep(5.0)
        here.start(name, Role.DECODE, epoch=f"again-{number}-{random.Random(number).random()}")
    await here.warmed()


def _not_less(collector: FleetMetrics, before: float) -> float:
    samples = [s for metric in collector.collect() for s in metric.samples]
    now = sum(s.value for s in samples if s.name == "breakeven_prompt_tokens_total")
    assert now >= before
    return now


async def test_a_pair_that_waits_for_its_turn_is_not_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Replicas are introduced one after the other. Who comes last waits for longer than an
    introduction may take, and that is no fault of theirs."""
    slow = replace(COSTS, prefill=PrefillCurve(1.5, 0.0, 0.0))
    async with world(prefill=1, decode=10, costs=slow) as here:
        assert here.now() > 60.0
        assert len(here.fleet.pairs.links) == 10
        assert "not warmed" not in caplog.text


async def test_who_is_lost_while_waiting_for_its_turn_holds_nobody_up() -> None:
    """A replica that dies before its introduction has begun is not introduced: the next one does
    not wait for the end of an introduction to nobody."""
    slow = replace(COSTS, prefill=PrefillCurve(1.5, 0.0, 0.0))
    async with world(prefill=1, decode=1, costs=slow) as here:
        began_s = here.now()
        here.start("decode-1", Role.DECODE)
        here.start("decode-2", Role.DECODE)
        await asyncio.sleep(5.0)
        assert here.fleet.member("decode-2") is not None
        here.engine("decode-2").crash()
        await asyncio.sleep(5.0)
        here.start("decode-2", Role.DECODE, epoch="2")
        await here.warmed()
        assert here.now() - began_s < 50.0


async def test_whoever_drains_is_introduced_to_nobody_new() -> None:
    """It may be gone before it has read what another handed it, whose blocks would then wait for
    their lease to end."""
    async with world(prefill=1, decode=2) as here:
        leaving = here.engine("decode-0")
        told = leaving.load
        leaving.load = lambda: msgspec.structs.replace(told(), draining=True)  # type: ignore[method-assign]
        await asyncio.sleep(2.0)
        here.start("prefill-1", Role.PREFILL)
        await asyncio.sleep(10.0)
        met = {pair for pair in here.fleet.pairs.links if "prefill-1" in pair}
        assert met == {("prefill-1", "decode-1")}
        leaving.load = told  # type: ignore[method-assign]
        await here.warmed()
        assert ("prefill-1", "decode-0") in here.fleet.pairs.links
