"""What an engine's prefill and decode cost, timed once before it serves.

Probes run on the engine itself, with random tokens, and their blocks are dropped afterwards.
They give the router its prefill curve.
"""

import random
import time

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from workers.tiers import NO_TIERS

# Prompt lengths in the order they are tried; the later ones only while the budget lasts.
_LENGTHS_TOKENS = (32, 128, 384, 1024)
_STEPS = 8

Sample = tuple[int, int, float]


def probe(core: EngineCore, budget_s: float, seed: int) -> tuple[tuple[Sample, ...], float]:
    """(new tokens, cached tokens, seconds) of some prefills, and the seconds of a decode step.

    Stops before a length whose predicted time would overrun `budget_s`, but always gives the
    first two. `core` must be idle.
    """
    rng = random.Random(seed)
    _run(core, _prompt(core, rng, _LENGTHS_TOKENS[0]), 2)  # first touch: allocations, lazy code
    samples: list[Sample] = []
    started = time.perf_counter()
    for length in _LENGTHS_TOKENS:
        if not _fits(core, samples, length, budget_s - (time.perf_counter() - started)):
            break
        samples.append((length, 0, _run(core, _prompt(core, rng, length), 1)[0]))
    _, *steps_s = _run(core, _prompt(core, rng, _LENGTHS_TOKENS[0]), 1 + _STEPS)
    core.reset_prefix_cache()
    return tuple(samples), sum(steps_s) / len(steps_s)


def _fits(core: EngineCore, samples: list[Sample], length: int, left_s: float) -> bool:
    if length + 1 + _STEPS > core.vllm_config.model_config.max_model_len:
        return False
    if len(samples) < 2:
        return True
    last_length, _, last_s = samples[-1]
    return last_s * length / last_length <= left_s


def _prompt(core: EngineCore, rng: random.Random, length: int) -> list[int]:
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    return [rng.randrange(vocabulary) for _ in range(length)]


def _run(core: EngineCore, prompt: list[int], tokens: int) -> list[float]:
    """Seconds until each token of one request on an idle engine."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    params.extra_args = {"kv_transfer_params": dict(NO_TIERS)}
    request = EngineCoreRequest(
        request_id=f"probe-{len(prompt)}-{tokens}",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt="probe",
        data_parallel_rank=None,
    )
    core.add_request(*core.preprocess_add_request(request))
    times_s, mark = [], time.perf_counter()
    while core.scheduler.has_requests():
        outputs, _ = core.step_fn()
        core.post_step(True)
        now = time.perf_counter()
        if any(o.new_token_ids for batch in (outputs or {}).values() for o in batch.outputs):
            times_s.append(now - mark)
            mark = now
    return times_s
