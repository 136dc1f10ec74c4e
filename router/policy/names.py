"""Under which names a request runs that allows a lossy codec: that codec's, or the exact ones.

Blocks that a codec rounds have names of their own, so one prompt may be stored as both, each where
it came from and as large as it is. Such a request may use either, and gets the one by which its
first token costs least. Under its codec's names it leaves blocks that are smaller to fetch, so
those are taken unless the exact ones cost less by a margin: like prompts go on under like names.
"""

from dataclasses import replace

from kv.plan import Plan, Reason, Rival
from router.policy.pair import MAX_RIVALS


def exact_if_cheaper(lossy: Plan, exact: Plan, margin: float) -> Plan | None:
    """`exact`, with the other one among its rivals, where it costs less by a ratio of `margin`.

    None where it does not, and where the other was not chosen by its cost but to try a curve.
    """
    if lossy.reason is Reason.EXPLORED or exact.cost_s * (1.0 + margin) >= lossy.cost_s:
        return None
    beaten = Rival(lossy.shape, lossy.prefill, lossy.decode, lossy.predicted_ttft_s, lossy.cost_s)
    rivals = (beaten, *exact.rivals)[:MAX_RIVALS]
    return replace(exact, reason=Reason.EXACT_NAMES, rivals=rivals)
