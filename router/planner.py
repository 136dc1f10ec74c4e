"""One request's question, and the plan by which it is answered."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import count

from kv.block import TOKEN_BYTES, chain, root_key
from router.audit import Footprint
from router.explorer import Explorer
from router.fleet import Fleet
from router.orders import Order
from router.policy import Policy
from router.policy.explore import Exploration
from router.policy.names import exact_if_cheaper
from router.policy.question import Question
from router.policy.registry import CHOOSE
from router.policy.session import affinity
from router.request import Request
from router.shadow import Choice


@dataclass(frozen=True, slots=True)
class Prices:
    """What plans are priced by beside time; configs/cpu.yaml explains each under `router`."""

    assumed_streams: float = 0.5
    compute_price: float = 0.1
    moving_price: float = 0.0
    session_slack: float = 0.1
    fetch_tokens: int = 512
    overrun: float = 2.0
    hysteresis: float = 0.05
    displaced_price: float = 1.0


class Planner:
    """Names a request's blocks, looks them up, and plans by the policy in force.

    `order` names that policy and its shadow; it is asked for each plan. Without an `explorer`
    nothing is explored.
    """

    def __init__(
        self,
        fleet: Fleet,
        prices: Prices,
        order: Callable[[], Order] = Order,
        explorer: Explorer | None = None,
    ) -> None:
        self._fleet, self._prices, self._order = fleet, prices, order
        self._explorer = explorer
        self._tickets = count()

    async def plan(self, request: Request, avoid: Collection[str] = ()) -> tuple[Request, Choice]:
        """A plan without the replicas to `avoid`, unless no other decode replica is there; and the
        request under the names that it goes by.

        Raises `NoReplicaError`.
        """
        yields = request.patience_s(self._fleet.now()) is not None
        asked, exploration = request.settled(), self._exploration(avoid, yields)
        choice = await self._choice(asked, avoid, exploration)
        # Baselines and the kill switch do not weigh one against the other.
        if request.exact is not None and choice.order.policy is Policy.BREAKEVEN:
            exactly = request.under(request.exact)
            other = await self._choice(exactly, avoid, None)
            plan = exact_if_cheaper(choice.plan, other.plan, self._prices.hysteresis)
            if plan is not None:
                asked, choice = exactly, replace(other, plan=plan)
        if self._explorer is not None:
            self._explorer.uses(choice.plan, choice.question.yields)
        return asked, choice

    async def _choice(
        self, request: Request, avoid: Collection[str], exploration: Exploration | None
    ) -> Choice:
        """What the policy in force says to a request under its own names."""
        block_tokens = self._fleet.block_tokens()
        keys = _keys(request, block_tokens)
        found = await self._fleet.look(keys)
        codec = None if request.keep is None else request.keep.codec
        question = Question(
            prompt_tokens=request.prompt_tokens,
            snapshot=self._fleet.snapshot(keys, found, codec is not None).without(avoid),
            assumed_streams=self._prices.assumed_streams,
            local_only=request.local_only,
            compute_price=self._prices.compute_price,
            moving_price=self._prices.moving_price,
            affinity=affinity(request.context.tenant, request.context.cache_key),
            session_slack=self._prices.session_slack,
            ticket=next(self._tickets),
            fetch_tokens=self._prices.fetch_tokens,
            overrun=self._prices.overrun,
            yields=request.patience_s(self._fleet.now()) is not None,
            may_split=request.keep is None or not request.keep.yields,
            hysteresis=self._prices.hysteresis,
            displaced_price=self._prices.displaced_price,
            exploration=exploration,
        )
        order = self._order()
        plan = CHOOSE[order.policy](question)
        plan = plan if codec is None else plan.coded(codec)
        footprint = Footprint(keys, block_tokens, question.snapshot.kv_bytes_per_token)
        return Choice(question, order, plan, footprint, codec)

    def _exploration(self, avoid: Collection[str], yields: bool) -> Exploration | None:
        """A request that a replica has failed already is not experimented with; one that gives way
        would show nothing of a curve."""
        if self._explorer is None or avoid or yields:
            return None
        return self._explorer.exploration()

    def keys(self, request: Request) -> list[bytes]:
        """Names of the blocks that may be reused: without the last token, which engines always
        compute, and with it all of its block."""
        return _keys(request, self._fleet.block_tokens())


def _keys(request: Request, block_tokens: int) -> list[bytes]:
    reusable = request.known[:-TOKEN_BYTES]
    return chain(root_key(request.salt), reusable, block_tokens)
