"""What every policy is asked."""

from dataclasses import dataclass

from router.policy.explore import Exploration
from router.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Question:
    """One request against one snapshot.

    `assumed_streams` is how many streams are taken to run on a decode replica that is idle now:
    they are whom a prefill there would stall if they came while it lasts. `compute_price` is how
    many seconds of waiting a second of computing is worth, `moving_price` a second in which blocks
    are moved. `affinity` names the session that the
    request belongs to; its turns keep to one decode replica among plans that cost no more than
    the best and a ratio of `session_slack`. `ticket` grows by one from question to question.
    `fetch_tokens` is the constant of the policy `threshold`. A fetch that takes `overrun` times as
    long as predicted is given up. A request that `yields` is planned by what it costs others
    rather than by when it is answered. Unless it `may_split` no head of it is computed elsewhere:
    its blocks may take nobody's place in the host tier that would lend the head. Plans whose costs
    differ by a ratio of `hysteresis` are equally cheap. `displaced_price` is how many seconds of
    waiting a second is worth that bringing back what a plan displaces will take. With `exploration`
    a plan that is not the cheapest may be tried.
    """

    prompt_tokens: int
    snapshot: Snapshot
    assumed_streams: float
    local_only: bool = False
    compute_price: float = 0.1
    moving_price: float = 0.0
    affinity: bytes | None = None
    session_slack: float = 0.1
    ticket: int = 0
    fetch_tokens: int = 512
    overrun: float = 2.0
    yields: bool = False
    may_split: bool = True
    hysteresis: float = 0.0
    displaced_price: float = 1.0
    exploration: Exploration | None = None
