"""Which replicas serve a request, and whether its prompt is computed on P or on D.

Costs are predicted seconds. Four are not the request's own: a prefill on a decode replica stalls
every stream that runs there for as long as it takes, one more stream lengthens every step, what is
computed twice is paid for twice, and blocks that come push others out, some of which will be asked
for again.

All plans are priced at once: `local` on each decode replica, then `remote` on each pair, in one
vector whose order is by shape, decode replica and prefill replica. Of equals the first is taken.
Whoever computes takes from its own tiers first what is cheaper to fetch (`router.policy.tiers`):
then a plan is `fetch` or `fetch-remote`. Of near equals one is taken that leaves a session, or else
a prefix, where it is (`router.policy.session`, `router.policy.kept`). It is then held against the
best `split` (`router.policy.split`).
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kv.catalogue import Tier
from kv.parts import Action, Part, in_turn
from kv.plan import UNHINTED, Hints, Plan, Reason, Rival, Shape, Source, Span
from router.columns import (
    BASE_S,
    ENTRY_S,
    OWN_S,
    PER_TOKEN2_S,
    PER_TOKEN_S,
    QUEUE_S,
    RUNNING,
    UNNAMED,
    WAITING_S,
    Columns,
    Floats,
)
from router.errors import NoReplicaError
from router.policy import peer, split, tiers
from router.policy.explore import MOST_COST, Exploration
from router.policy.kept import kept
from router.policy.objective import objective
from router.policy.question import Question
from router.policy.session import preferred
from router.snapshot import Unnamed

# Plans that were not chosen and are kept for the audit.
MAX_RIVALS = 3
# A fetch is not late before this: an engine may be in the midst of a step for as long.
LEAST_PATIENCE_S = 0.1
# Costs nearer than this ratio are equal: they differ by the order of additions.
TIE = 1e-9


class _Prices(NamedTuple):
    """Every plan of one question: `local` on each decode replica, then `remote` on each pair.

    `hit_tokens`, `compute_s` and `lacked_bytes` are by replica: what its paged KV has of the
    prompt, what computing costs behind that and what it fetches, and what a handoff brings it.
    `taken` is None where nobody's tiers hold anything.
    """

    columns: Columns
    cost_s: Floats
    hit_tokens: Floats
    compute_s: Floats
    lacked_bytes: Floats
    taken: tiers.Taken | None

    def pair(self, plan: int) -> tuple[int, int | None]:
        """The places of a plan's decode and prefill replicas."""
        names, n_decode = self.columns.names, self.columns.n_decode
        if plan < n_decode:
            return plan, None
        d, p = divmod(plan - n_decode, len(names) - n_decode)
        return d, n_decode + p

    def on_decode(self, plans: NDArray[np.intp]) -> NDArray[np.intp]:
        """The places of their decode replicas."""
        names, n_decode = self.columns.names, self.columns.n_decode
        pairs = (plans - n_decode) // max(1, len(names) - n_decode)
        return np.where(plans < n_decode, plans, pairs)

    def computes(self, plan: int) -> int:
        """The place of whoever computes."""
        d, p = self.pair(plan)
        return d if p is None else p

    def fetches(self, plan: int) -> bool:
        """Whether that one takes something from its tiers first."""
        return self.taken is not None and bool(self.taken.through[self.computes(plan)])

    def names(self, plan: int) -> tuple[str | None, str]:
        """Its prefill and its decode replica."""
        d, p = self.pair(plan)
        names = self.columns.names
        return None if p is None else names[p], names[d]

    def described(self, plan: int) -> tuple[Shape, str | None, str, float]:
        """Its shape, its replicas, and its seconds to the first token."""
        (d, p), (names, n_decode, loads, links, *_) = self.pair(plan), self.columns
        at, fetches = self.computes(plan), self.fetches(plan)
        ttft_s = loads[QUEUE_S, at] + self.compute_s[at]
        if self.taken is not None:
            ttft_s += self.taken.seconds[at]
        if p is None:
            return Shape.FETCH if fetches else Shape.LOCAL, None, names[d], float(ttft_s)
        link = d, p - n_decode
        # A link's curve ends at the first token, so D's own step is in it.
        ttft_s += links.latency_s[link] + links.per_byte_s[link] * self.lacked_bytes[d]
        ttft_s += loads[WAITING_S, d]
        shape = Shape.FETCH_REMOTE if fetches else Shape.REMOTE
        return shape, names[p], names[d], float(ttft_s)

    def parts(self, plan: int) -> tuple[Part, ...]:
        """What these seconds are made of."""
        (d, p), (names, n_decode, loads, links, *_) = self.pair(plan), self.columns
        at = self.computes(plan)
        steps = [(Action.QUEUE, names[at], float(loads[QUEUE_S, at]))]
        if self.taken is not None:
            steps.append((Action.FETCH, names[at], float(self.taken.seconds[at])))
        steps.append((Action.COMPUTE, names[at], float(self.compute_s[at])))
        if p is not None:
            link = d, p - n_decode
            moved_s = links.latency_s[link] + links.per_byte_s[link] * self.lacked_bytes[d]
            steps.append((Action.QUEUE, names[d], float(loads[WAITING_S, d])))
            steps.append((Action.HANDOFF, names[d], float(moved_s)))
        return in_turn(steps)


def choose(question: Question) -> Plan:
    """The cheapest plan, or its session's, or one that is tried instead of it. Raises
    `NoReplicaError` without a decode replica."""
    snapshot = question.snapshot
    if not snapshot.decode:
        raise NoReplicaError(len(snapshot.prefill), 0)
    plan = _best(question)
    if question.exploration is None or question.local_only or snapshot.blind:
        return plan
    return _tried(question, question.exploration, plan) or plan


def _best(question: Question) -> Plan:
    prices = _price(question)
    cheapest = best = _first_of_the_cheapest(prices.cost_s)
    if question.affinity is not None:
        best = _of_session(question.affinity, question.session_slack, prices, cheapest)
    elif question.hysteresis:
        best = _kept(question, prices, cheapest)
    # A session's turns keep to one replica.
    own = None if question.affinity is None else prices.names(best)[1]
    cost_s = float(prices.cost_s[best])
    divided = split.better(question, prices.columns, cost_s, own)
    if divided is not None:
        beaten = Rival(*prices.described(best), cost_s)
        rivals = (beaten, *_rivals(prices, best))[:MAX_RIVALS]
        return split.plan(question, prices.columns, divided, rivals)
    reason = _reason(question, prices, cheapest, best)
    return _plan(question, prices, best, reason, _rivals(prices, best))


def _tried(question: Question, exploration: Exploration, cheapest: Plan) -> Plan | None:
    """Any plan of about that cost, fetches that cost more than computing included; a session's on
    its own replica. None where it tells nothing."""
    prices = _price(question, slack=MOST_COST - 1.0)
    near = np.flatnonzero(prices.cost_s <= cheapest.cost_s * MOST_COST)
    if question.affinity is not None:
        near = near[prices.on_decode(near) == prices.columns.names.index(cheapest.decode)]
    if not near.size:
        return None
    at = int(near[int(exploration.draw * near.size)])
    costs = cheapest.predicted_ttft_s, cheapest.cost_s
    beaten = Rival(cheapest.shape, cheapest.prefill, cheapest.decode, *costs)
    rivals = (beaten, *cheapest.rivals)[:MAX_RIVALS]
    plan = _plan(question, prices, at, Reason.EXPLORED, rivals)
    return plan if exploration.tries(plan, cheapest) else None


def _plan(
    question: Question, prices: _Prices, at: int, reason: Reason, rivals: tuple[Rival, ...]
) -> Plan:
    """One of these as a plan."""
    shape, prefill, decode, ttft_s = prices.described(at)
    spans = _spans(question.prompt_tokens, prices, at)
    return Plan(
        shape=shape,
        reason=reason,
        prefill=prefill,
        decode=decode,
        spans=spans,
        predicted_ttft_s=ttft_s,
        cost_s=float(prices.cost_s[at]),
        rivals=rivals,
        hints=_hints(question, prices, at, spans),
        parts=prices.parts(at),
    )


def _price(question: Question, slack: float = 0.0) -> _Prices:
    n, snapshot = question.prompt_tokens, question.snapshot
    columns = snapshot.columns or Columns.of(snapshot.decode, snapshot.prefill, snapshot.links)
    prices = objective(question)
    told, columns = columns, prices.priced(columns)
    names, n_decode, loads, links, hit_tokens, *_ = columns
    hit_tokens = _usable(n, hit_tokens)
    lacked = n - hit_tokens
    lacked_bytes = lacked * snapshot.kv_bytes_per_token
    # What a second of computing costs; on a decode replica streams stall meanwhile.
    streams, taken = np.maximum(loads[RUNNING], question.assumed_streams), None
    streams[n_decode:] = 0.0
    weight = prices.weigh(loads, streams)
    if columns.tiers is not None and not question.local_only:
        taken = _taken(n, columns, hit_tokens, weight, snapshot.kv_bytes_per_token, slack)
        lacked = n - taken.hit_tokens
    compute_s = _compute_s(n, lacked, loads)
    weight *= compute_s
    spent_s = weight if taken is None else weight + taken.seconds
    pushed_s = _pushed_s(question, columns, n - hit_tokens)
    if pushed_s is not None:
        spent_s = spent_s + pushed_s
    n_prefill = 0 if question.local_only else len(names) - n_decode
    cost_s = np.empty(n_decode * (1 + n_prefill))
    np.add(spent_s[:n_decode], loads[OWN_S, :n_decode], out=cost_s[:n_decode])
    if n_prefill:
        remote_s = cost_s[n_decode:].reshape(n_decode, n_prefill)
        np.multiply(links.per_byte_s, lacked_bytes[:n_decode, None], out=remote_s)
        remote_s += links.latency_s
        remote_s += loads[ENTRY_S, :n_decode, None]
        remote_s += spent_s[n_decode:] + loads[QUEUE_S, n_decode:]
        if pushed_s is not None:
            remote_s += pushed_s[:n_decode, None]  # what P computes comes to D, too
    if taken is not None and prices.transfer != 1.0:
        taken = taken._replace(seconds=taken.seconds / prices.transfer)
    return _Prices(told, cost_s, hit_tokens, compute_s, lacked_bytes, taken)


def _pushed_s(question: Question, columns: Columns, new_tokens: Floats) -> Floats | None:
    """What a prompt pushes out of each replica that it comes to; None where that costs nothing."""
    if columns.displaced is None or not question.displaced_price:
        return None
    return question.displaced_price * columns.displaced.seconds(new_tokens)


def _taken(
    prompt_tokens: int,
    columns: Columns,
    hit_tokens: Floats,
    weight: Floats,
    token_bytes: int,
    slack: float,
) -> tiers.Taken:
    assert columns.tiers is not None

    def computing(behind_tokens: Floats) -> Floats:
        return weight * _compute_s(prompt_tokens, prompt_tokens - behind_tokens, columns.loads)

    held = columns.tiers._replace(tokens=_usable(prompt_tokens, columns.tiers.tokens))
    return tiers.take(held, hit_tokens, token_bytes, computing, slack)


def _usable(prompt_tokens: int, hit_tokens: Floats) -> Floats:
    """An engine always computes the last token itself, since that gives the logits."""
    return np.minimum(hit_tokens, prompt_tokens - 1)


def _compute_s(prompt_tokens: int, lacked: Floats, loads: Floats) -> Floats:
    """`PrefillCurve.seconds` of each replica; its n^2 - h^2 is (n - h)(n + h)."""
    seconds = 2.0 * prompt_tokens - lacked  # n + h
    seconds *= loads[PER_TOKEN2_S]
    seconds += loads[PER_TOKEN_S]
    seconds *= lacked
    seconds += loads[BASE_S]
    return seconds


def _first_of_the_cheapest(cost_s: Floats) -> int:
    least_s = cost_s[cost_s.argmin()]
    return int((cost_s <= least_s * (1.0 + TIE)).argmax())


def _of_session(session: bytes, slack: float, prices: _Prices, cheapest: int) -> int:
    """The plan on the session's own replicas among those that cost about as much."""
    cost_s, (names, n_decode, *_) = prices.cost_s, prices.columns
    near = cost_s <= cost_s[cheapest] * (1.0 + max(slack, TIE))
    local, remote = near[:n_decode], near[n_decode:].reshape(n_decode, -1)
    places = {names[d]: int(d) for d in np.flatnonzero(local | remote.any(axis=1))}
    d = places[preferred(session, places)]
    plans = n_decode + d * remote.shape[1] + np.flatnonzero(remote[d])
    if local[d] and not (plans.size and cost_s[plans].min() < cost_s[d]):
        return d
    by_prefill = {prices.names(int(plan))[0] or "": int(plan) for plan in plans}
    return by_prefill[preferred(session, by_prefill)]


def _kept(question: Question, prices: _Prices, cheapest: int) -> int:
    margin = question.hysteresis
    # A part of the prompt that is as small as the difference in costs is noise, too.
    noise = margin * question.prompt_tokens
    of_all = prices.cost_s, cheapest, prices.hit_tokens, prices.columns.n_decode
    return kept(*of_all, margin, noise)


def _rivals(prices: _Prices, best: int) -> tuple[Rival, ...]:
    """The cheapest plans but the best, cheapest first. One of them has the other shape: that of
    computing on P or on D which was not chosen is what people ask for."""
    cost_s, n_decode = prices.cost_s.copy(), prices.columns.n_decode
    cost_s[best] = np.inf
    plans = []
    for _ in range(MAX_RIVALS):
        plans.append(int(cost_s.argmin()))
        cost_s[plans[-1]] = np.inf
    other = prices.cost_s[n_decode:] if best < n_decode else prices.cost_s[:n_decode]
    alike = all((plan < n_decode) == (best < n_decode) for plan in plans)
    if alike and np.isfinite(other).any():
        plans[-1] = int(other.argmin()) + (n_decode if best < n_decode else 0)
    costs = ((plan, float(prices.cost_s[plan])) for plan in dict.fromkeys(plans) if plan != best)
    return tuple(Rival(*prices.described(plan), cost) for plan, cost in costs if cost != np.inf)


def _reason(question: Question, prices: _Prices, cheapest: int, best: int) -> Reason:
    if question.local_only:
        return Reason.PROMPT_LOGPROBS
    if question.snapshot.blind:
        return Reason.NO_CATALOGUE
    if best != cheapest:
        return Reason.KEPT if question.affinity is None else Reason.SESSION
    if prices.fetches(best):
        return Reason.CHEAPER_FETCH
    if prices.columns.n_decode == 1 and np.isinf(prices.cost_s[1:]).all():
        return Reason.ONLY_REPLICA
    if not question.snapshot.prefill:
        return Reason.NO_PREFILL_REPLICA
    local = prices.pair(best)[1] is None
    return Reason.CHEAPER_LOCAL if local else Reason.CHEAPER_REMOTE


def _spans(prompt_tokens: int, prices: _Prices, best: int) -> tuple[Span, ...]:
    at, columns, taken = prices.computes(best), prices.columns, prices.taken
    name = columns.names[at]
    end = int(min(columns.hit_tokens[at], prompt_tokens - 1))
    spans = [Span(Source.HIT, 0, end, name)] if end else []
    if taken is not None and columns.tiers is not None:
        for place in range(taken.through[at]):
            start, held = end, int(min(columns.tiers.tokens[place, at], prompt_tokens - 1))
            if held > start:
                end = held
                tier = columns.tiers.order[place]
                spans.append(Span(Source.FETCH, start, end, name, tier))
    return (*spans, Span(Source.COMPUTE, end, prompt_tokens, name))


def _hints(question: Question, prices: _Prices, best: int, spans: tuple[Span, ...]) -> Hints:
    """Nothing beyond the plan's hits and fetches: the rest was not worth it, or is not there. Where
    nobody can say what tiers hold they are asked, for as long as computing would take."""
    hints, at = _own_hints(question, prices, best, spans), prices.computes(best)
    snapshot, start = question.snapshot, spans[-1].start_token
    if question.local_only or not snapshot.peers:
        return hints
    found = peer.lender(
        prices.columns,
        snapshot.peers,
        at,
        start,
        question.prompt_tokens,
        snapshot.kv_bytes_per_token,
    )
    if found is None:
        return hints
    reach = None if hints.reach_tokens is None else found.reach_tokens
    deadline_s = (hints.deadline_s or 0.0) + found.saved_s
    return Hints(reach, (*hints.tiers, Tier.PEER), deadline_s, found.address)


def _own_hints(question: Question, prices: _Prices, best: int, spans: tuple[Span, ...]) -> Hints:
    """Of the tiers of whoever computes."""
    at, columns = prices.computes(best), prices.columns
    fetches = [span for span in spans if span.source is Source.FETCH]
    if not fetches:
        priced = columns.tiers is not None and bool((columns.tiers.tokens[:, at] > 0.0).any())
        told = not (question.snapshot.blind or columns.loads[UNNAMED, at])
        if question.local_only or priced or told:
            return Hints(spans[-1].start_token)
        return replace(UNHINTED, deadline_s=float(prices.compute_s[at]))
    start, end = fetches[0].start_token, fetches[-1].end_token
    curve = columns.loads[: PER_TOKEN2_S + 1, at]
    saved_s = float(curve[PER_TOKEN_S] * (end - start) + curve[PER_TOKEN2_S] * (end**2 - start**2))
    # By then computing would have been done: who waits no longer than that pays twice at most.
    if columns.loads[UNNAMED, at] == Unnamed.OWN:  # they may be what comes next
        return replace(UNHINTED, deadline_s=saved_s)
    assert prices.taken is not None
    late_s = max(LEAST_PATIENCE_S, question.overrun * float(prices.taken.seconds[at]))
    if not question.yields:  # else it is fetched for what computing costs, however long it takes
        late_s = min(late_s, max(LEAST_PATIENCE_S, saved_s))
    return Hints(end, tuple(span.tier for span in fetches if span.tier), late_s)
