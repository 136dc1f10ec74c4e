"""Which private parts of vLLM, Ray and NIXL we lean on; a new version must still have them."""

import inspect
import re
from pathlib import Path

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from router.client import ClusterClient, ClusterCore
from router.context import TIER_OF_CLASS, Bound, Notes, RequestContext, bound
from router.tiers_told import tell_tiers


def test_cluster_client_sets_every_attribute_that_asyncllm_uses() -> None:
    """`AsyncLLM`'s methods on the request path find everything they read on `self`."""
    used = set()
    for name in ("generate", "add_request", "_add_request", "abort", "_run_output_handler"):
        used |= _self_names(getattr(AsyncLLM, name))
    source = inspect.getsource(ClusterClient)
    missing = {
        name for name in used if not hasattr(ClusterClient, name) and f"self.{name}" not in source
    }
    # Set by `_run_output_handler` itself.
    assert missing <= {"_logger_ref"}


def test_cluster_core_answers_what_asyncllm_asks_of_an_engine_core() -> None:
    """Every `engine_core.x` on the request path exists on ours."""
    asked = set()
    for name in ("generate", "add_request", "_add_request", "abort", "_run_output_handler"):
        source = inspect.getsource(getattr(AsyncLLM, name))
        asked |= {part.split("(")[0] for part in source.split("engine_core.")[1:]}
    assert {name for name in asked if name.isidentifier()} <= set(dir(ClusterCore))


def test_the_engine_core_has_what_the_step_loop_uses() -> None:
    """`workers.engine` steps, aborts and hashes by these."""
    for name in (
        "step",
        "step_with_batch_queue",
        "post_step",
        "preprocess_add_request",
        "add_request",
        "abort_requests",
        "reset_prefix_cache",
        "shutdown",
    ):
        assert callable(getattr(EngineCore, name))
    source = inspect.getsource(EngineCore.__init__)
    for attribute in ("self.scheduler", "self.batch_queue", "self.step_fn", "self.aborts_queue"):
        assert attribute in source


def test_the_scheduler_takes_requests_up_by_what_the_stopwatch_replaces() -> None:
    """`workers.stopwatch` notes the time of these calls, which go by the instances' names."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "self.scheduler.schedule(" in inspect.getsource(EngineCore.step)
    source = inspect.getsource(Scheduler.schedule)
    assert "self.connector.get_num_new_matched_tokens(" in source
    assert "self.connector.update_state_after_alloc(" in source
    assert {"scheduled_new_reqs", "num_scheduled_tokens"} <= set(SchedulerOutput.__annotations__)
    assert "req_id" in NewRequestData.__annotations__


def test_events_carry_the_session_and_nothing_else_reads_it() -> None:
    """`workers.erasure` finds a tenant's blocks by the tag that travels there."""
    import vllm.v1.worker as worker
    from vllm.v1.core import block_pool
    from vllm.v1.core.sched import scheduler

    assert "session_id=request.session_id" in inspect.getsource(block_pool.BlockPool)
    assert "session_id" not in inspect.getsource(scheduler)
    runners = Path(worker.__file__).parent.rglob("*.py")
    assert not any("session_id" in runner.read_text() for runner in runners)


def test_the_block_pool_has_what_the_erasure_uses() -> None:
    """Names to pages, eviction by page, and which free pages a connector still reads."""
    from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool

    assert callable(BlockHashToBlockMap.get_one_block)
    assert callable(BlockPool.evict_blocks)
    source = inspect.getsource(BlockPool.__init__)
    for attribute in ("self.blocks", "self.cached_block_hash_to_block", "self._reuse_watchers"):
        assert attribute in source


def test_the_output_processor_keeps_requests_where_failures_are_put() -> None:
    """`ClusterClient._fail` finds a request's queue and parent here."""
    assert "self.request_states" in inspect.getsource(OutputProcessor.__init__)
    assert {"queue", "parent_req"} <= set(inspect.signature(RequestState.__init__).parameters)


def test_responses_are_made_with_the_tier_that_was_used() -> None:
    """vLLM fills the field in neither model; ours is there wherever a response is made, and none
    outside of a request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    tell_tiers()

    def told(model: type[ChatCompletionResponse | CompletionResponse]) -> str | None:
        usage = model.model_fields["usage"].annotation
        assert usage is not None
        return model(model="m", choices=[], usage=usage()).model_dump()["service_tier"]

    assert told(ChatCompletionResponse) is None
    for service_class, tier in TIER_OF_CLASS.items():
        context = RequestContext("r", service_class=service_class)
        token = bound.set(Bound(context, Notes()))
        assert told(ChatCompletionResponse) == told(CompletionResponse) == tier
        bound.reset(token)


def test_nixl_takes_the_progress_delay_from_where_we_set_it() -> None:
    """`calm_progress_thread` replaces the config class that the agent instantiates."""
    import nixl._api as api

    source = inspect.getsource(api.nixl_agent.__init__)
    assert "nixlBind.nixlAgentConfig()" in source
    assert "pthrDelay = 0" in source


def test_serve_opens_its_port_by_the_function_that_we_replace() -> None:
    """`serve_port.bind_to` only helps while Serve calls this name with this address."""
    from ray.serve._private import replica

    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)


def _self_names(function: object) -> set[str]:
    return set(re.findall(r"\bself\.(\w+)", inspect.getsource(function)))  # type: ignore[arg-type]
