"""What answers say of the service tier that was used.

vLLM's response models have OpenAI's field, and its serving layer leaves it empty. A response is
made in the task of the request that it answers, where the class is bound.
"""

from typing import Any

from pydantic_core import PydanticUndefined
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse

from router.context import TIER_OF_CLASS, bound

_FIELD = "service_tier"


def used() -> str | None:
    """The tier of the request that is answered here; None outside of one."""
    asked = bound.get()
    return None if asked is None else TIER_OF_CLASS[asked.context.service_class]


def tell_tiers() -> None:
    """Have responses say it; the Responses API repeats its request's tier (`router.intake`)."""
    models: tuple[Any, ...] = (ChatCompletionResponse, CompletionResponse)
    for model in models:
        field = model.model_fields[_FIELD]
        field.default, field.default_factory = PydanticUndefined, used
        model.model_rebuild(force=True)
