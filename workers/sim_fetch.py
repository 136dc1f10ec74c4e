"""What a request on a simulated engine waits for: a split's head from the replica that computes it,
blocks that another replica lends, and what the vault has.

As `kv.offload_split` and `workers.peer.question` do it: the peer is asked again and again for what
it has not got yet, until it has ended the request or does not answer; what it will not bring comes
from the vault, and what that has not got either is computed.
"""

import asyncio
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.plan import UNHINTED, Hints

# As the real tiers'.
ASK_AGAIN_S = 0.02
LOAD_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Sought:
    """Blocks of one request: the peer's to bring, and behind these the vault's. `work` names what
    the peer computes for it; it is empty where it only lends. Without `spare` the vault is not
    asked for what the peer lacks."""

    peer: str | None
    work: str
    head: tuple[bytes, ...]
    tail: tuple[bytes, ...]
    spare: bool
    head_deadline_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Lent:
    """Which of the blocks that were asked for a peer has; no more will come once it has `ended`
    the request that computes them."""

    here: tuple[bytes, ...]
    ended: bool


class Lender(Protocol):
    """A peer."""

    def lent(self, work: str, keys: Sequence[bytes]) -> Lent | None:
        """Its answer; None where it gives none."""
        ...


def sought(
    hints: Hints | None,
    work: str,
    lacks: Sequence[tuple[int, bytes]],
    vault: Container[bytes],
    block_tokens: int,
) -> Sought | None:
    """What a request whose prompt `lacks` these blocks, each with its place, may wait for; None if
    that is nothing."""
    hints = hints or UNHINTED
    spare = Tier.VAULT in hints.tiers
    head_blocks = hints.head_tokens // block_tokens if hints.peer is not None else 0
    if hints.peer is not None and not head_blocks:
        head_blocks, work = lacks[-1][0] + 1 if lacks else 0, ""
    head = tuple(key for at, key in lacks if at < head_blocks)
    behind = [key for at, key in lacks if at >= head_blocks] if spare else []
    there = next((at for at, key in enumerate(behind) if key not in vault), len(behind))
    if not head and not there:
        return None
    deadline_s = LOAD_TIMEOUT_S if hints.deadline_s is None else hints.deadline_s
    head_deadline_s = hints.head_deadline_s if hints.head_tokens else deadline_s
    peer = hints.peer
    return Sought(peer, work, head, tuple(behind[:there]), spare, head_deadline_s, deadline_s)


@dataclass(slots=True)
class Fetch:
    """One request's. `answer_s` is how long a peer may say nothing; nothing happens on an engine
    that is not `awake`."""

    sought: Sought
    peer: LinkCurve
    vault: LinkCurve
    block_bytes: int
    answer_s: float
    lender: Callable[[str], Lender | None]
    stored: Container[bytes]
    awake: asyncio.Event
    brought: dict[bytes, Tier] = field(default_factory=dict)

    async def run(self) -> dict[bytes, Tier]:
        """By block, from where it came. Both sides at once: it takes as long as the slower one."""
        loop, tail = asyncio.get_running_loop(), self.sought.tail
        tail_at, tail_in = loop.time() + self._seconds(self.vault, tail), False
        with suppress(TimeoutError):
            async with asyncio.timeout(self.sought.deadline_s):
                await self._again(await self._head())
                await asyncio.sleep(tail_at - loop.time())
                tail_in = True
        if tail_in or loop.time() >= tail_at:
            self.brought.update(dict.fromkeys(tail, Tier.VAULT))
        await self.awake.wait()
        return self.brought

    async def _head(self) -> list[bytes]:
        """What the peer will not bring, once it will bring no more."""
        loop, left = asyncio.get_running_loop(), list(self.sought.head)
        heard_s = loop.time()
        until_s = heard_s + self.sought.head_deadline_s
        while left and loop.time() < min(until_s, heard_s + self.answer_s):
            await self.awake.wait()
            lent = self._ask(left)
            if lent is not None:
                heard_s = loop.time()
                await self._move(self.peer, Tier.PEER, lent.here)
                left = [key for key in left if key not in self.brought]
                if lent.ended:
                    break
            if left:
                await asyncio.sleep(ASK_AGAIN_S)
        return left

    def _ask(self, keys: Sequence[bytes]) -> Lent | None:
        peer = None if self.sought.peer is None else self.lender(self.sought.peer)
        return None if peer is None else peer.lent(self.sought.work, keys)

    async def _again(self, missed: Sequence[bytes]) -> None:
        """The vault has the head too."""
        if self.sought.spare:
            await self._move(self.vault, Tier.VAULT, [key for key in missed if key in self.stored])

    async def _move(self, link: LinkCurve, tier: Tier, keys: Sequence[bytes]) -> None:
        await asyncio.sleep(self._seconds(link, keys))
        self.brought.update(dict.fromkeys(keys, tier))

    def _seconds(self, link: LinkCurve, keys: Sequence[bytes]) -> float:
        return link.seconds(len(keys) * self.block_bytes) if keys else 0.0
