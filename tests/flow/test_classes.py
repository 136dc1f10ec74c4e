"""Both classes of requests on real engines: who comes first, whose blocks go, and that tokens are
what they are without any of it."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.classes_engine import ClassesEngine, batch, person
from tests.flow.test_tiers import BLOCK_BYTES, BLOCK_TOKENS, tiers
from workers.connector import KEEP_FOR_DECODE
from workers.errors import EngineOptionError
from workers.options import namespace

CHUNK = 64
# Steps of a prompt of so many blocks and its tail.
SMALL = {"max_num_batched_tokens": CHUNK}


def steps_of(blocks: int) -> int:
    return -(-(blocks * BLOCK_TOKENS + 5) // CHUNK)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClassesEngine]:
    """Chunks of 64 tokens, two seats, 64 pages and no tier."""
    folder = tmp_path_factory.mktemp("classes")
    more = {"kv_bytes": 64 * BLOCK_BYTES, "engine": {**SMALL, "max_num_seqs": 2}}
    with ClassesEngine(tiny_model, folder, {}, **more) as engine:
        yield engine


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").ask("reset", host=True)


def alone(engine: ClassesEngine, *asked: dict[str, Any]) -> list[list[int]]:
    """The tokens of each request when nobody else is there and nothing is cached."""
    tokens = []
    for each in asked:
        assert engine.ask("reset", host=True)
        [answer] = engine.race({**each, "at_step": 0})
        tokens.append(answer["tokens"])
    assert engine.ask("reset", host=True)
    return tokens


def test_a_person_overtakes_a_prompt_that_is_computed(engine: ClassesEngine) -> None:
    """A batch prompt of 20 steps is under way; a person's of 5 steps comes after the fourth, and
    has its answer's first token within its own steps and the one under way. The batch prompt then
    goes on where it was."""
    asked = batch(1, 40), person(2, 8, at_step=4)
    expected = alone(engine, *asked)
    slow, fast = engine.race(*asked)
    assert [slow["tokens"], fast["tokens"]] == expected
    assert fast["first_step"] <= 4 + 1 + steps_of(8)
    # Beside the person's stream it had all tokens of its steps but one.
    assert slow["first_step"] <= steps_of(40) + steps_of(8) + 2


def test_a_person_overtakes_those_that_wait(engine: ClassesEngine) -> None:
    """Five batch requests are queued; a person who comes last is answered before all but those
    whose prompt was computed by then."""
    asked = [*(batch(seed, 12, 2) for seed in range(10, 15)), person(15, 4, 2, at_step=2)]
    expected = alone(engine, *asked)
    answers = engine.race(*asked)
    assert [answer["tokens"] for answer in answers] == expected
    assert all(answers[-1]["first_step"] < answer["first_step"] for answer in answers[:-1])


def test_without_patience_the_first_that_came_is_first(engine: ClassesEngine) -> None:
    """A batch request that is as old as it may be is overtaken by nobody."""
    asked = batch(1, 40, patience_s=0.0), person(2, 8, at_step=4)
    slow, fast = engine.race(*asked)
    assert slow["first_step"] < fast["first_step"]


def test_a_batch_stream_gives_its_seat(engine: ClassesEngine) -> None:
    """Two batch streams have both seats; the younger goes back to wait, comes back, and both give
    the tokens that they give alone."""
    asked = batch(1, 6, 60), batch(2, 6, 60), person(3, 4, at_step=30)
    expected = alone(engine, *asked)
    before = engine.ask("preemptions")
    answers = engine.race(*asked)
    assert [answer["tokens"] for answer in answers] == expected
    assert engine.ask("preemptions") == before + 1
    first, second, fast = answers
    assert fast["first_step"] <= 30 + 1 + steps_of(4)
    assert first["last_step"] < second["last_step"]


def test_batch_streams_give_their_pages(engine: ClassesEngine) -> None:
    """Two of them hold 50 of 63 pages, and a person's prompt needs 24."""
    asked = batch(1, 23, 60), batch(2, 23, 60), person(3, 24, at_step=45)
    expected = alone(engine, *asked)
    before = engine.ask("preemptions")
    answers = engine.race(*asked)
    assert [answer["tokens"] for answer in answers] == expected
    assert engine.ask("preemptions") > before
    assert answers[2]["first_step"] <= 45 + 2 + steps_of(24)


def test_people_are_never_preempted_for_batch_requests(engine: ClassesEngine) -> None:
    """However many wait, and however long a person's answer is."""
    asked = [person(1, 20, 80), *(batch(seed, 20, 30, at_step=5) for seed in range(2, 6))]
    expected = alone(engine, *asked)
    answers = engine.race(*asked)
    assert [answer["tokens"] for answer in answers] == expected
    # A token a step from its first to its last.
    assert answers[0]["last_step"] - answers[0]["first_step"] == 79


def test_the_load_tells_what_gives_way(engine: ClassesEngine) -> None:
    """And nothing once it has ended."""
    engine.race(batch(1, 4), batch(2, 4), person(3, 4))
    assert engine.ask("yielding") == [0, 0, 0, 0]


@pytest.mark.parametrize("yields", [True, False])
def test_blocks_of_batch_requests_go_first(engine: ClassesEngine, yields: bool) -> None:
    """A person's prompt stays on the device while 20 times its size of batch prompts pass; without
    the mark they displace it."""
    engine.race(person(1, 16, 1))
    for seed in range(2, 12):
        engine.race(batch(seed, 32, 1, yields=yields))
    [again] = engine.race(person(1, 16, 1))
    kept = again["sources"].get("device", 0)
    assert kept == (16 * BLOCK_TOKENS if yields else 0)


def test_a_batch_request_does_not_take_a_person_s_blocks_along(engine: ClassesEngine) -> None:
    """One whose prompt begins with a person's: its own part goes first, the other stays."""
    engine.race(person(1, 16, 1))
    # `prompt` of one seed begins alike at every length.
    [longer] = engine.race(batch(1, 24, 1))
    assert longer["sources"]["device"] == 16 * BLOCK_TOKENS
    for seed in range(2, 8):
        engine.race(batch(seed, 40, 1))
    [again] = engine.race(person(1, 16, 1))
    assert again["sources"]["device"] == 16 * BLOCK_TOKENS


def test_what_a_person_uses_is_a_person_s(engine: ClassesEngine) -> None:
    """Blocks that a batch request computed stay once a person's prompt has them."""
    engine.race(batch(1, 16, 1))
    engine.race(person(1, 16, 1))
    for seed in range(2, 8):
        engine.race(batch(seed, 32, 1))
    [again] = engine.race(person(1, 16, 1))
    assert again["sources"]["device"] == 16 * BLOCK_TOKENS


def test_batch_requests_find_their_own_blocks(engine: ClassesEngine) -> None:
    """While nobody needs the pages: a batch job's common prefix is computed once."""
    engine.race(batch(1, 16, 1))
    [again] = engine.race(batch(1, 20, 1))
    assert again["sources"]["device"] == 16 * BLOCK_TOKENS


def test_a_full_host_tier_keeps_people_s_blocks(tiny_model: Path, tmp_path: Path) -> None:
    """A batch request stores what fits, and behind it nothing; a person's prompt comes back whole,
    and so do the tokens of a batch request that is preempted over tiers."""
    section = tiers(tmp_path, host_blocks=20)
    more = {"kv_bytes": 64 * BLOCK_BYTES, "engine": {**SMALL, "max_num_seqs": 2}}
    with ClassesEngine(tiny_model, tmp_path, section, **more) as engine:
        [first] = engine.race(person(1, 16))
        disk = engine.ask("told")["disk"][0]
        for seed in range(2, 6):
            engine.race(batch(seed, 12, 2))
        told = engine.ask("told")
        assert told["disk"][0] == disk
        assert told["host"][0] == 20
        assert engine.ask("reset", host=False)
        [again] = engine.race(person(1, 16))
        assert again["tokens"] == first["tokens"]
        assert again["sources"]["host"] == 16 * BLOCK_TOKENS
        asked = batch(7, 6, 60), batch(8, 6, 60), person(9, 4, at_step=30)
        expected = alone(engine, *asked)
        assert [answer["tokens"] for answer in engine.race(*asked)] == expected


def test_handoffs_are_as_they_are_without_classes(tiny_model: Path, tmp_path: Path) -> None:
    """A batch prompt that gave way on a prefill replica is handed off; on a decode replica with one
    seat its stream gives way too, and goes on without the handoff."""
    more = {"engine": {**SMALL, "max_num_seqs": 1}}
    asked = batch(1, 20, 40)
    fast = person(2, 6, 4)
    with (
        ClassesEngine(tiny_model, tmp_path / "p", {}, role="prefill", **more) as prefill,
        ClassesEngine(tiny_model, tmp_path / "d", {}, **more) as decode,
    ):
        expected = alone(decode, asked, fast)
        kept = {**asked, "n": 1, "transfer": KEEP_FOR_DECODE}
        slow, beside = prefill.race(kept, {**person(3, 6, 1), "at_step": 3})
        assert beside["first_step"] < slow["first_step"]
        before = decode.ask("preemptions")
        quick = {**fast, "at_step": -1, "behind": 10}
        slow, quick = decode.race({**asked, "transfer": slow["handoff"]}, quick)
        assert [slow["tokens"], quick["tokens"]] == expected
        assert slow["sources"]["received"] >= 20 * BLOCK_TOKENS
        assert decode.ask("preemptions") == before + 1
        assert quick["last_step"] < slow["last_step"]


def test_the_order_of_requests_is_the_router_s() -> None:
    """Neither a configuration nor a body sets vLLM's."""
    with pytest.raises(EngineOptionError, match="set by Breakeven"):
        namespace("model", ("model",), {"scheduling_policy": "fcfs"})
    assert namespace("model", ("model",), {}).scheduling_policy == "priority"


def test_vllm_has_what_classes_lean_on() -> None:
    """`workers.classes`, `workers.first_to_go`: attributes and methods of the pinned version."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
    from vllm.v1.core.sched.request_queue import PriorityRequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.__init__)
    for attribute in (
        "max_num_scheduled_tokens",
        "max_num_active_reqs",
        "kv_holding_waiting",
        "waiting",
        "running",
        "deferred_frees",
        "prev_step_scheduled_req_ids",
        "requires_kv_delivery",
        "finished_recving_kv_req_ids",
        "current_step",
    ):
        assert f"self.{attribute}" in source
    scheduling = inspect.getsource(Scheduler.schedule)
    assert "token_budget = self.max_num_scheduled_tokens" in scheduling
    assert scheduling.index("self.current_step += 1") < scheduling.index("step < request.next_d")
    preempting = inspect.signature(Scheduler._preempt_request).parameters
    assert {"request", "timestamp", "drop_stale_output"} <= set(preempting)
    # A request that is preempted and resumed in one step must not count as one of the last step.
    assert "prev_step_scheduled_req_ids" in inspect.getsource(Scheduler.reset_prefix_cache)
    assert {"add_request", "remove_requests"} <= set(vars(PriorityRequestQueue))
    assert {"remove", "prepend_n"} <= set(vars(FreeKVCacheBlockQueue))
    assert "self.fake_free_list_head" in inspect.getsource(FreeKVCacheBlockQueue.__init__)
    assert {"get_cached_block", "get_num_free_blocks"} <= set(vars(BlockPool))
