"""What a codec does to a real engine's answers: verdicts for `kv.codecs.gate`.

Each prompt is answered three ways, greedily: computed; restored from the host tier as it is; and
restored after every page of it was encoded and decoded there. The second is what the third is
held against, so that only the codec differs. Steps vLLM's engine itself, on the caller's thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kv.codecs.codec import Codec, CodecName
from kv.codecs.frame import VERSION
from kv.codecs.gate import Comparison, Verdict, compare
from kv.codecs.page import CPU_ATTENTION, Dtype, PageShape
from kv.errors import CodecError
from workers import quality_prompts

_DTYPES = {torch.float32: Dtype.FP32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.FP16}
# Of vLLM's CPU attention; AMX tiles are no order of axes (`kv.codecs.page`).
_PLAIN_ISAS = frozenset({"vec", "vec16"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured: verdicts, and why a codec has none."""

    verdicts: Mapping[CodecName, Verdict]
    refused: Mapping[CodecName, str]


def measure(config: VllmConfig, codecs: Sequence[Codec]) -> Outcome:
    """Judge codecs by the fixed prompts on an engine of this configuration, which has a host tier
    (`workers.tiers`) and no other connector. Takes seconds a prompt and codec. Raises `CodecError`
    for a model whose pages no codec knows."""
    core = EngineCore(config, Executor.get_class(config), log_stats=True)
    try:
        tokenizer = cached_tokenizer_from_config(config.model_config)
        most = config.model_config.max_model_len - quality_prompts.ANSWER_TOKENS
        prompts = [tokenizer.encode(text)[:most] for text in quality_prompts.texts()]
        return judge(core, prompts, quality_prompts.ANSWER_TOKENS, codecs)
    finally:
        core.shutdown()


def judge(
    core: EngineCore, prompts: Sequence[list[int]], tokens: int, codecs: Sequence[Codec]
) -> Outcome:
    """Verdicts over these prompts and so many tokens of each answer."""
    bench = _Bench(core)
    compared: dict[CodecName, list[Comparison]] = {}
    refused: dict[CodecName, str] = {}
    for ids in prompts:
        rows = bench.store(ids)
        exact = bench.restored(ids, tokens)
        for codec in codecs:
            if codec.name in refused:
                continue
            try:
                with bench.through(codec, rows):
                    found = bench.followed(ids, exact)
            except CodecError as error:
                refused[codec.name] = str(error)
                continue
            compared.setdefault(codec.name, []).append(found)
    verdicts = {
        name: _verdict(each, len(prompts) * tokens)
        for name, each in compared.items()
        if name not in refused
    }
    return Outcome(verdicts, refused)


def page_shape(core: EngineCore) -> PageShape:
    """What a row of the host tier holds. Raises `CodecError` for anything but one kind of plain
    attention layers in the order that codecs know."""
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
    remedy = "keep this model's blocks as they are (codec raw)"
    if len(groups) != 1 or type(spec) is not FullAttentionSpec or spec.dtype not in _DTYPES:
        raise CodecError("codecs", f"pages of {kinds} in {spec.dtype} are not known", remedy)
    layers: Any = core.vllm_config.compilation_config.static_forward_context
    isas = {getattr(layers[name], "isa", None) for name in groups[0].layer_names}
    if not current_platform.is_cpu() or not isas <= _PLAIN_ISAS:
        numbers = f"{current_platform.device_name} pages of {sorted(map(str, isas))} are not known"
        raise CodecError("codecs", numbers, remedy)
    names = len(groups[0].layer_names)
    heads, head_dim = spec.num_kv_heads, spec.head_size
    dtype = _DTYPES[spec.dtype]
    return PageShape(names, spec.block_size, heads, head_dim, dtype, CPU_ATTENTION)


class _Bench:
    """An idle engine whose host tier's pages can be exchanged between requests."""

    def __init__(self, core: EngineCore) -> None:
        self._core, self._restored_tokens = core, 0
        connector: Any = core.scheduler.connector
        self._host = connector.connector_scheduler.manager.primary_tier
        self._shape = page_shape(core)
        self._names = iter(range(1 << 30))

    def store(self, ids: list[int]) -> list[memoryview]:
        """Compute a prompt; its pages in the host tier."""
        # No more than the prompt: `followed` is to compute the answer's tokens.
        _, hashes = self._run(ids, 1, {"max_offload_tokens": len(ids)})
        keys = [make_block_hash_with_group_id(name, 0) for name in hashes]
        held = [self._host._policy.get(key) for key in keys[: len(ids) // self._shape.tokens]]
        if None in held:
            numbers = f"{len(held)} blocks of a prompt do not fit"
            raise CodecError("the host tier", numbers, "raise tiers.host.bytes")
        view = self._host.get_kv_memoryview()
        rows = [view[chunk.chunk_id : chunk.chunk_id + 1].cast("B") for chunk in held]
        return [row[: self._shape.page_bytes] for row in rows]

    def restored(self, ids: list[int], tokens: int) -> list[tuple[int, float]]:
        """Tokens and logprobs of an answer to a prompt that comes from the host tier."""
        self._core.reset_prefix_cache()
        before = self._restored_tokens
        # What is computed behind a lossy page must not be stored as if it were exact.
        answer, _ = self._run(ids, tokens, {"max_offload_tokens": 0})
        if self._restored_tokens == before:
            raise CodecError("quality", "a prompt did not come from the host tier", "report it")
        return answer

    def followed(self, ids: list[int], exact: Sequence[tuple[int, float]]) -> Comparison:
        """Hold each token of the exact answer against what is likeliest behind those before it:
        where the answers part, the exact one is gone on with. So a near tie costs one token, not
        all that follow."""
        agreed, delta, at = 0, 0.0, 0
        while at < len(exact):
            behind = [token for token, _ in exact[:at]]
            found = compare(exact[at:], self.restored(ids + behind, len(exact) - at))
            agreed += found.agreed_tokens
            delta = max(delta, found.max_logprob_delta)
            at += found.agreed_tokens + 1
        return Comparison(agreed, delta)

    @contextmanager
    def through(self, codec: Codec, rows: Sequence[memoryview]) -> Iterator[None]:
        """While pages are as `codec` brings them back. Raises `CodecError` as it does."""
        originals = [bytes(row) for row in rows]
        payload = bytearray(codec.encoded_bytes(self._shape))
        try:
            for row in rows:
                codec.encode(row, self._shape, payload)
                codec.decode(payload, self._shape, row)
            yield
        finally:
            for row, original in zip(rows, originals, strict=True):
                row[:] = original

    def _run(
        self, ids: list[int], tokens: int, hints: Mapping[str, Any]
    ) -> tuple[list[tuple[int, float]], list[bytes]]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        params.extra_args = {"kv_transfer_params": dict(hints)}
        name = f"quality-{next(self._names)}"
        asked = EngineCoreRequest(name, ids, None, params, None, 0.0, None, None, None)
        request, wave = self._core.preprocess_add_request(asked)
        self._core.add_request(request, wave)
        answer: list[tuple[int, float]] = []
        while self._core.scheduler.has_requests():
            outputs, executed = self._core.step_fn()
            self._core.post_step(executed)
            for batch in (outputs or {}).values():
                for output in batch.outputs:
                    if output.prefill_stats is not None:
                        stats = output.prefill_stats
                        self._restored_tokens += stats.num_external_cached_tokens
                    logprobs = output.new_logprobs.logprobs if output.new_logprobs else ()
                    chosen = [float(row[0]) for row in logprobs]
                    answer += zip(output.new_token_ids, chosen, strict=True)
        return answer, list(request.block_hashes)


def _verdict(compared: Sequence[Comparison], tokens: int) -> Verdict:
    agreed = sum(each.agreed_tokens for each in compared)
    delta = max(each.max_logprob_delta for each in compared)
    return Verdict(quality_prompts.digest(), VERSION, tokens, agreed, delta)
