"""Penalties of a carried request, whose first answered tokens stand in its prompt.

vLLM's own penalties would take those for prompt. This processor applies all three of a carried
request in vLLM's order (repetition, frequency, presence; `apply_penalties` in
model_executor/layers/utils.py), over the true answer, and leaves other requests alone.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from workers.carry import ANSWERED, PENALTIES


@dataclass(slots=True)
class _Carried:
    """One request's penalties; `output` is vLLM's own list, which grows."""

    presence: float
    frequency: float
    repetition: float
    prompt: list[int]
    answered: list[int]
    output: list[int]


class CarriedPenalties(LogitsProcessor):
    """Given to each engine as a custom logits processor."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._carried: dict[int, _Carried] = {}

    def is_argmax_invariant(self) -> bool:
        """Penalties change which token is likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch."""
        process_dict_updates(self._carried, batch_update, _carried)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Shapes: `logits` is (requests, vocabulary), changed in place."""
        for index, each in self._carried.items():
            _penalize(logits[index], each, self._device)
        return logits


def _carried(
    params: SamplingParams, prompt: list[int] | None, output: list[int]
) -> _Carried | None:
    extra = params.extra_args or {}
    if PENALTIES not in extra or prompt is None:
        return None
    presence, frequency, repetition = extra[PENALTIES]
    start = len(prompt) - extra[ANSWERED]
    return _Carried(presence, frequency, repetition, prompt[:start], prompt[start:], output)


def _penalize(row: torch.Tensor, each: _Carried, device: torch.device) -> None:
    answer = torch.tensor(each.answered + each.output, device=device)
    counts = torch.bincount(answer, minlength=row.shape[0])[: row.shape[0]]
    seen = counts > 0
    if each.repetition != 1.0:
        seen_anywhere = seen.clone()
        seen_anywhere[torch.tensor(each.prompt, device=device)] = True
        scaled = torch.where(row > 0, row / each.repetition, row * each.repetition)
        row.copy_(torch.where(seen_anywhere, scaled, row))
    row -= each.frequency * counts
    row -= each.presence * seen
