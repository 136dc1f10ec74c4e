"""Curves measured on request: prompts of growing length through every replica and over every link.

They run one at a time, on top of whatever else runs, and are learned from as requests are.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from kv.block import pack_tokens
from router.fleet import Fleet
from router.member import Member
from workers.errors import WorkerError
from workers.messages import Delta, Handoff, Role, Submit

LENGTHS_TOKENS = (32, 128, 512, 1024, 2048)
# Token ids that every vocabulary of a text model has.
_VOCABULARY = 1000
# Who computes, if not the decode replica itself; and that one.
_Way = tuple[Member | None, Member]


class Probing:
    """Probes one fleet; `body` is an engine request for one greedy token."""

    def __init__(
        self, fleet: Fleet, body: bytes, rng: random.Random, now: Callable[[], float]
    ) -> None:
        self._fleet, self._body, self._random, self._now = fleet, body, rng, now
        self._alone = asyncio.Lock()

    async def probe(self, budget_s: float) -> Counter[str]:
        """How many prompts were `computed`, `handed_off`, and `skipped` since they should not fit
        into the time, or a replica refused them. Goes from short to long, over all replicas with
        each length; waits while another probe runs."""
        async with self._alone:
            until, counted = self._now() + budget_s, Counter[str]()
            for tokens in LENGTHS_TOKENS:
                for way in self._ways():
                    counted[await self._tried(tokens, way, until)] += 1
            return counted

    def _ways(self) -> list[_Way]:
        """Each decode replica alone, and each warmed pair, in random order."""
        pairs = (map(self._fleet.member, pair) for pair in self._fleet.pairs.links)
        ways: list[_Way] = [(None, member) for member in self._fleet.up(Role.DECODE)]
        ways += [(p, d) for p, d in pairs if p is not None and d is not None]
        self._random.shuffle(ways)
        return ways

    async def _tried(self, tokens: int, way: _Way, until: float) -> str:
        p, d = way
        if self._now() + (p or d).speed.curve.seconds(tokens, 0) > until:
            return "skipped"
        prompt = pack_tokens([self._random.randrange(_VOCABULARY) for _ in range(tokens)])
        name = f"probe-{self._random.getrandbits(64):016x}"
        try:
            if p is not None:
                await self._hand_off(name, prompt, p, d)
                return "handed_off"
            await self._compute(Submit(name, Role.DECODE, prompt, self._body), d)
            return "computed"
        except WorkerError:  # lost, or the prompt is too long for it
            return "skipped"

    async def _hand_off(self, name: str, prompt: bytes, p: Member, d: Member) -> None:
        def release(handoff: Handoff) -> None:
            d.release(f"{name}.release", handoff)

        ask = Submit(name, Role.PREFILL, prompt, self._body)
        handoff = (await self._compute(ask, p, release)).handoff
        if handoff is None:
            return
        try:
            with p.read_by(d, name):
                take = Submit(name, Role.DECODE, prompt, self._body, handoff)
                first = (await self._deltas(take, d))[0]
        except WorkerError:
            release(handoff)
            raise
        if first.spent is not None:
            self._fleet.refit.handed_off((p.name, d.name), d, first.spent)

    async def _compute(
        self, submit: Submit, by: Member, unread: Callable[[Handoff], None] | None = None
    ) -> Delta:
        """The last delta of a prompt that `by` computes; of a single token it is the first too."""
        last = (await self._deltas(submit, by, unread))[-1]
        self._fleet.refit.computed(by, last.sources, last.spent)
        return last

    async def _deltas(
        self, submit: Submit, by: Member, unread: Callable[[Handoff], None] | None = None
    ) -> list[Delta]:
        async with by.run(submit, unread) as deltas:
            return [delta async for delta in deltas]
