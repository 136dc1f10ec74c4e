"""vLLM's engine client over the cluster: what makes vLLM's own HTTP API serve from many engines.

vLLM's `AsyncLLM` joins a renderer, an input processor and an output processor to one engine core.
`ClusterClient` keeps all of that, fan-out for `n`, stop strings and aborts included, and puts the
pipeline where the engine core was.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing
from copy import copy
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.renderers.registry import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kv.block import pack_tokens
from kv.codecs.codec import CodecName
from router.context import Bound, Notes, RequestContext, ServiceClass, bound
from router.errors import STATUS, RouterError, UnservableError
from router.pipeline import Pipeline
from router.request import Names, Request
from router.salt import Salter
from workers.messages import Delta, Keep

# Sampling parameters that look back at generated tokens in ways of their own.
_UNCARRIED = ("bad_words", "thinking_token_budget", "repetition_detection")
_FINISH = {str(reason): reason for reason in FinishReason}


class ClusterCore:
    """The pipeline in the shape of vLLM's engine-core client: requests in, outputs out.

    `fail(request_id, error)` is called when no plan for a request is left.
    """

    def __init__(
        self, pipeline: Pipeline, salter: Salter, fail: Callable[[str, Exception], None]
    ) -> None:
        self._pipeline, self._salter, self._fail = pipeline, salter, fail
        self._outputs: asyncio.Queue[EngineCoreOutput] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Start a request in the task context of the HTTP request that it belongs to."""
        try:
            asked = _request(request, self._salter)
        except RouterError as error:  # vLLM would call any other error its own
            raise _http_error(error) from error
        task = asyncio.create_task(self._serve(asked))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        """Stop requests that are complete: vLLM's output handler found a stop string."""
        self.cancel(request_ids, "stop")

    def cancel(self, request_ids: Iterable[str], outcome: str = "aborted") -> None:
        """Stop requests at once, on whichever engines they are."""
        for request_id in request_ids:
            task = self._tasks.get(request_id)
            if task is not None:
                task.cancel(outcome)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Everything that came since the last call, at least one output."""
        outputs = [await self._outputs.get()]
        while not self._outputs.empty():
            outputs.append(self._outputs.get_nowait())
        return EngineCoreOutputs(outputs=outputs)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """Abort what still runs."""
        self.cancel(list(self._tasks))

    async def _serve(self, request: Request) -> None:
        try:
            async with aclosing(self._pipeline.serve(request)) as deltas:
                async for delta in deltas:
                    self._outputs.put_nowait(_output(delta))
        except Exception as error:  # the task's edge: whatever it is, its client must hear of it
            self._fail(request.request_id, error)


class ClusterClient(AsyncLLM):
    """vLLM's `EngineClient` for a cluster."""

    def __init__(self, config: VllmConfig, pipeline: Pipeline, salter: Salter) -> None:
        # AsyncLLM's own constructor starts an engine; these are the attributes that its methods
        # use (held to the pinned version by tests/flow/test_vllm_contract.py).
        self.vllm_config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.observability_config = config.observability_config
        self.log_requests = self.log_stats = False
        self.logger_manager = self.admission_stats = self.profiler = self.output_handler = None
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=False,
            stream_interval=config.scheduler_config.stream_interval,
        )
        self.engine_core = ClusterCore(pipeline, salter, self._fail)
        self._pipeline = pipeline

    @property
    def is_running(self) -> bool:
        """Whether outputs are being handled; engines may all be gone, which is a 503 and passes."""
        return self.output_handler is None or not self.output_handler.done()

    @property
    def errored(self) -> bool:
        return not self.is_running

    async def check_health(self) -> None:
        """Raise once the task that handles outputs has ended: no request would be answered."""
        if self.errored:
            raise self.dead_error

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Stop requests that their clients have left."""
        names = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        self.engine_core.cancel(self.output_processor.abort_requests(names, internal))

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse before a response is begun, where a status can still be sent."""
        try:
            asked = bound.get()
            self._pipeline.check(n, asked)
        except RouterError as error:
            raise _http_error(error) from error

    def _fail(self, request_id: str, error: Exception) -> None:
        """End one request, and its siblings of the same call, with an error."""
        state = self.output_processor.request_states.get(request_id)
        if state is None:
            return
        queue = state.queue
        name = state.parent_req.request_id if state.parent_req else request_id
        aborted = self.output_processor.abort_requests([name], internal=True)
        self.engine_core.cancel(sibling for sibling in aborted if sibling != request_id)
        if queue is not None:
            queue.put(_http_error(error) if isinstance(error, RouterError) else error)


def body_of(request: EngineCoreRequest) -> bytes:
    """What the engine is to do, without the prompt and without what clients must not steer.

    Raises `UnservableError` for what cannot be sent to an engine.
    """
    bare = copy(request)
    bare.prompt_token_ids = None
    bare.priority = 0
    bare.data_parallel_rank = None
    bare.kv_hints = None
    bare.trace_headers = None
    # An encoder a call: with tensors it is not thread-safe, and it holds what it last encoded.
    name = request.request_id
    try:
        head, *rest = MsgpackEncoder().encode(bare)
    except OverflowError as error:
        raise UnservableError(name, "a number in it has more than 64 bits") from error
    if rest:
        raise UnservableError(name, "it has tensors (images, embeddings)")
    return bytes(head)


def warm_body() -> bytes:
    """An engine request for one greedy token, with which pairs are warmed."""
    return body_of(
        EngineCoreRequest(
            request_id="warm",
            prompt_token_ids=None,
            mm_features=None,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt="warm",
            data_parallel_rank=None,
        )
    )


def _request(request: EngineCoreRequest, salter: Salter) -> Request:
    asked = bound.get() or Bound(RequestContext(request.request_id), Notes())
    context, client_salt = asked.context, request.cache_salt
    codec = None if salter.gate(context.codec) is None else context.codec
    exact = _names(request, salter, context, client_salt, None)
    own = exact if codec is None else _names(request, salter, context, client_salt, codec)
    params = request.sampling_params
    return Request(
        request_id=request.request_id,
        tokens=pack_tokens(request.prompt_token_ids or []),
        body=own.body,
        salt=own.salt,
        context=context,
        local_only=params is not None and params.prompt_logprobs is not None,
        notes=asked.notes,
        uncarried=_uncarried(request),
        keep=own.keep,
        max_tokens=None if params is None else params.max_tokens,
        exact=None if codec is None else exact,
    )


def _names(
    request: EngineCoreRequest,
    salter: Salter,
    context: RequestContext,
    client_salt: str | None,
    codec: CodecName | None,
) -> Names:
    """What its blocks are called where this codec may store them; `request` gets the salt."""
    # Here and not in the body of the call: some of the APIs would not pass a salt on.
    request.cache_salt = salter.salt(context.tenant, client_salt, codec)
    keep = Keep(codec, context.retention_s, context.service_class is ServiceClass.BATCH)
    return Names(request.cache_salt, body_of(request), None if keep == Keep() else keep)


def _uncarried(request: EngineCoreRequest) -> str | None:
    """What of a request could not go on on another engine in mid-answer."""
    params = request.sampling_params
    if params is None:
        return None
    if params.structured_outputs is not None and request.reasoning_ended is False:
        return "a grammar that waits for the end of reasoning"
    return next((name for name in _UNCARRIED if getattr(params, name)), None)


def _output(delta: Delta) -> EngineCoreOutput:
    if delta.extras is not None:
        # Writable copies: torch warns of tensors over read-only buffers.
        frames = [bytearray(frame) for frame in delta.extras]
        output: EngineCoreOutput = MsgpackDecoder(EngineCoreOutput).decode(frames)
        output.request_id = delta.request_id
    else:
        output = EngineCoreOutput(delta.request_id, delta.token_ids)
        output.finish_reason = _FINISH[delta.finish_reason] if delta.finish_reason else None
        output.stop_reason = delta.stop_reason
    output.kv_transfer_params = None
    if delta.sources is not None:
        prompt, computed = delta.sources.prompt_tokens, delta.sources.computed_tokens
        output.prefill_stats = PrefillStats(
            num_prompt_tokens=prompt,
            num_computed_tokens=computed,
            num_cached_tokens=prompt - computed,
            num_local_cached_tokens=prompt - computed,
        )
    return output


def _http_error(error: RouterError) -> GracefulHTTPError:
    status = STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)
    return GracefulHTTPError(str(error), status)
