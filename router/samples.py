"""What one request's seconds say of the curves that it was planned by; None where they say nothing.

Engines compute several prompts at once and go on with loads between steps, so that seconds of one
request are in part another's.
"""

from kv.curve import LinkCurve, PrefillCurve, PrefillSample, TransferSample
from kv.plan import Plan, Shape
from workers.messages import Sources, Spent

# Of the prompt tokens that an engine computed meanwhile, the least that must be a request's own.
_LEAST_OWN = 0.5


def prefill_sample(sources: Sources, spent: Spent) -> PrefillSample | None:
    """What computing a prompt took: of the time in which others were computed too, its share by
    tokens. Streams beside it count as they are: they are the load that plans meet."""
    own, cached = sources.computed_tokens, sources.prompt_tokens - sources.computed_tokens
    if own < 1 or spent.computing_s <= 0.0:
        return None
    share = own / (own + spent.others_tokens)
    # While it loaded, others' tokens were computed in time that is not counted here.
    if share < _LEAST_OWN or (spent.loaded_bytes and spent.others_tokens):
        return None
    return PrefillSample(own, cached, spent.computing_s * share)


def handoff_of(plan: Plan) -> tuple[str, str] | None:
    """The pair whose link a plan uses. In a split D waits for its tail too, and takes the head out
    of a host tier."""
    if plan.prefill is None or plan.shape is Shape.SPLIT:
        return None
    return plan.prefill, plan.decode


def link_sample(
    spent: Spent, link: LinkCurve, computing: PrefillCurve | None = None
) -> TransferSample | None:
    """What a handoff took until the first token, as far as that was not others' computing.

    A prompt that is computed meanwhile may have held it up for as long as that should take by
    `computing`, or not at all. Where the prediction lies between the two nothing was learned.
    """
    most_s = spent.loading_s + spent.computing_s
    if spent.loaded_bytes <= 0 or most_s <= 0.0:
        return None
    others_s = 0.0
    if spent.others_tokens:
        others_s = most_s if computing is None else computing.seconds(spent.others_tokens, 0)
    least_s, predicted_s = most_s - others_s, link.seconds(spent.loaded_bytes)
    if others_s and least_s <= predicted_s <= most_s:
        return None
    return TransferSample(spent.loaded_bytes, most_s if predicted_s > most_s else least_s)
