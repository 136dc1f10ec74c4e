"""From a message to vLLM's request and back: the only place that knows both shapes."""

from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kv.block import unpack_tokens
from kv.salt import tag_of
from workers.carry import carry
from workers.connector import KEEP_FOR_DECODE
from workers.messages import Delta, Role, Sources, Submit

_decoder = MsgpackDecoder(EngineCoreRequest)
_encoder = MsgpackEncoder()


def engine_request(submit: Submit) -> EngineCoreRequest:
    """What the engine is to run for `submit`."""
    request: EngineCoreRequest = _decoder.decode(submit.body)
    request.request_id = submit.request_id
    request.prompt_token_ids = unpack_tokens(submit.tokens)
    # In every event of its blocks; clients have no sessions here (`workers.erasure`).
    request.session_id = tag_of(request.cache_salt)
    carry(request, unpack_tokens(submit.answered))
    if submit.role is Role.PREFILL:
        request.sampling_params = _prefill_params(submit.lends)
    else:
        _take_handoff(request.sampling_params, submit.handoff)
    return request


def rejected_handoff(request_id: str, handoff: dict[str, Any]) -> EngineCoreRequest:
    """A request that is over before it starts, so that the connector tells the prefill replica
    to free what it kept (what vLLM's `notify_kv_transfer_request_rejected` does)."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": dict(handoff)}
        ),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )


def delta(output: EngineCoreOutput) -> Delta:
    """What one engine step added to one request, for the wire."""
    stats = output.prefill_stats
    return Delta(
        request_id=output.request_id,
        token_ids=output.new_token_ids,
        finish_reason=None if output.finish_reason is None else str(output.finish_reason),
        stop_reason=output.stop_reason,
        sources=None
        if stats is None
        else Sources(
            prompt_tokens=stats.num_prompt_tokens,
            computed_tokens=stats.num_computed_tokens,
            device_tokens=stats.num_local_cached_tokens,
            received_tokens=stats.num_external_cached_tokens,
        ),
        handoff=output.kv_transfer_params,
        extras=_extras(output),
    )


def has_handoff(request: Request) -> bool:
    """Whether its KV comes from another engine's pages, which may be another prompt's by now."""
    return "remote_engine_id" in (request.kv_transfer_params or {})


def _prefill_params(lends: bool) -> SamplingParams:
    # One greedy token and nothing else: the KV of a prompt does not depend on how its answer
    # is sampled, and the decode replica samples the first token itself.
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if lends else {"kv_transfer_params": dict(KEEP_FOR_DECODE)},
    )


def _take_handoff(params: SamplingParams | None, handoff: dict[str, Any] | None) -> None:
    if params is None:
        return
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
    if handoff is not None:
        extra["kv_transfer_params"] = dict(handoff)
    params.extra_args = extra or None


def _extras(output: EngineCoreOutput) -> list[bytes] | None:
    if output.new_logprobs is None and output.new_prompt_logprobs_tensors is None:
        return None
    return [bytes(frame) for frame in _encoder.encode(output)]
