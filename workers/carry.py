"""Going on with an answer that another engine began.

The tokens given so far become part of the prompt, and everything that counts from the beginning
of an answer is told about them: the limits, the seed, and penalties, which vLLM applies to
generated tokens only. Stop strings and logprobs live in the ingress and need nothing. The
ingress does not ask for what cannot be carried (`router.client`).
"""

from collections.abc import Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

# Under these names the penalties of a carried request reach `workers.penalties`.
PENALTIES = "breakeven_penalties"
ANSWERED = "breakeven_answered"
_SEED_MASK = 2**63 - 1


def carry(request: EngineCoreRequest, answered: list[int]) -> None:
    """Make `request`, whose prompt is set, go on behind `answered`; changes it in place."""
    params = request.sampling_params
    if not answered or params is None or request.prompt_token_ids is None:
        return
    request.prompt_token_ids = request.prompt_token_ids + answered
    if params.max_tokens is not None:
        params.max_tokens -= len(answered)
    params.min_tokens = max(0, params.min_tokens - len(answered))
    params.prompt_logprobs = None  # given with the first token
    if params.seed is not None:
        # The draws so far cannot be taken again; as many seeds further they are not repeated.
        params.seed = (params.seed + len(answered)) & _SEED_MASK
    _carry_penalties(params, len(answered))


def advance_grammar(request: Request, answered: Sequence[int]) -> bool:
    """Bring a grammar behind tokens that another engine gave; False while it is compiled."""
    structured = request.structured_output_request
    if structured is None:
        return True
    if not structured.is_grammar_ready:
        return False
    grammar = structured.grammar
    if not isinstance(grammar, StructuredOutputGrammar):
        raise ValueError(f"the grammar does not compile: {grammar}")
    if not grammar.accept_tokens(request.request_id, list(answered)):
        raise ValueError(f"the grammar refuses {len(answered)} tokens that were given under it")
    return True


def _carry_penalties(params: SamplingParams, answered: int) -> None:
    penalties = (
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )
    if penalties == (0.0, 0.0, 1.0):
        return
    params.presence_penalty, params.frequency_penalty, params.repetition_penalty = 0.0, 0.0, 1.0
    extra = {PENALTIES: list(penalties), ANSWERED: answered}
    params.extra_args = {**(params.extra_args or {}), **extra}
