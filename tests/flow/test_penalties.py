"""Carried penalties are vLLM's own, over the true answer."""

import random

import pytest
import torch
from vllm.model_executor.layers.utils import apply_penalties
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from workers.carry import carry
from workers.penalties import CarriedPenalties

VOCABULARY = 200


class _Update:
    """The part of vLLM's BatchUpdate that adds one request."""

    def __init__(self, params: SamplingParams, prompt: list[int], output: list[int]) -> None:
        self.removed: list[int] = []
        self.moved: list[tuple[int, int, object]] = []
        self.added = [(0, params, prompt, output)]


@pytest.mark.parametrize("seed", range(20))
def test_a_split_answer_is_penalized_as_a_whole_one(seed: int) -> None:
    """Wherever an answer was cut and carried, the logits after the processor equal those that
    vLLM's penalties give for the uncut answer."""
    rng = random.Random(seed)
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 30))]
    answer = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 40))]
    cut = rng.randrange(1, len(answer))
    penalties = (rng.uniform(-2, 2), rng.uniform(-2, 2), rng.choice((1.0, 1.3, 0.8)))
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    wanted = apply_penalties(
        logits.clone(),
        torch.tensor([prompt]),
        torch.tensor([answer]),
        *(torch.tensor([value]) for value in penalties),
    )
    params = SamplingParams(
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        repetition_penalty=penalties[2],
        max_tokens=100,
        min_tokens=50,
        seed=7,
    )
    request = EngineCoreRequest("r", list(prompt), None, params, None, 0.0, None, None, None)
    carry(request, answer[:cut])
    processor = CarriedPenalties(None, torch.device("cpu"), False)  # type: ignore[arg-type]
    update = _Update(params, request.prompt_token_ids or [], answer[cut:])
    processor.update_state(update)  # type: ignore[arg-type]
    torch.testing.assert_close(processor.apply(logits.clone()), wanted)
    assert (params.max_tokens, params.min_tokens) == (100 - cut, max(0, 50 - cut))
    assert params.seed == 7 + cut
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)


def test_other_requests_are_left_alone() -> None:
    """A request that was not carried is not touched, whatever its penalties."""
    params = SamplingParams(presence_penalty=1.0)
    processor = CarriedPenalties(None, torch.device("cpu"), False)  # type: ignore[arg-type]
    processor.update_state(_Update(params, [1, 2], [3]))  # type: ignore[arg-type]
    logits = torch.randn(1, VOCABULARY)
    assert torch.equal(processor.apply(logits.clone()), logits)
