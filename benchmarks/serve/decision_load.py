"""What both routers are asked in `decision.py`: the same prompts, holders and churn, by number.

A catalogue of `blocks` is chains of 128 blocks of 32 tokens. Chain c lies whole on replica c mod R.
Each 256th is hot: its first 64 blocks, a system prompt, lie on every replica, and 8 replicas hold
more of it, each to a depth of its own. A third of the prompts are hot chains, a third cold ones,
and a third are cold up to some block and then new. Churn takes 16 blocks off the end of a cold
chain and adds 16 of a chain that nobody asked for yet. Two other kinds of load are ours alone: in a
`scattered` one every replica holds every hot chain to a depth of its own, the most that a lookup
can have to tell apart; in a `tiered` one a vault holds all chains as well, so that whatever a
replica lacks of them may be fetched or split. Standard library only, since Dynamo runs in an
environment of its own.
"""

import contextlib
import os
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 32
CHAIN_BLOCKS = 128
CHAIN_TOKENS = BLOCK_TOKENS * CHAIN_BLOCKS
CHURN_BLOCKS = 16
HEAD_BLOCKS = 64
DEEPER = 8
HOT_EVERY = 256
SEED = 20261122


@dataclass(frozen=True)
class Churn:
    """16 blocks more on one replica, 16 less on another; each a chain and blocks [start, end)."""

    adds_to: int
    added: tuple[int, int, int]
    removes_from: int
    removed: tuple[int, int, int]


@dataclass(frozen=True)
class Load:
    """A catalogue of so many blocks on so many replicas."""

    blocks: int
    replicas: int
    kind: str = ""

    @property
    def chains(self) -> int:
        return self.blocks // CHAIN_BLOCKS

    def holdings(self, chain: int) -> Iterator[tuple[int, int]]:
        """Who holds a chain, and how many of its blocks."""
        if chain % HOT_EVERY:
            yield chain % self.replicas, CHAIN_BLOCKS
            return
        rng = random.Random(f"{SEED}/{chain}")
        deeper = set(rng.sample(range(self.replicas), min(DEEPER, self.replicas)))
        for replica in range(self.replicas):
            if replica == chain % self.replicas:
                yield replica, CHAIN_BLOCKS
            elif self.kind == "scattered":
                yield replica, rng.randint(1, CHAIN_BLOCKS)
            else:
                more = rng.randint(1, CHAIN_BLOCKS - HEAD_BLOCKS) if replica in deeper else 0
                yield replica, HEAD_BLOCKS + more

    def prompts(self, seed: int) -> Iterator[list[int]]:
        """Prompts of 4,096 token ids, without end."""
        rng = random.Random(seed)
        while True:
            kind, chain = rng.randrange(3), rng.randrange(self.chains)
            if kind == 0:
                yield tokens(chain - chain % HOT_EVERY)
            elif kind == 1:
                yield tokens(chain)
            else:
                cut = rng.randrange(CHAIN_BLOCKS) * BLOCK_TOKENS
                new = tokens(rng.randrange(10**9, 10**10))
                yield tokens(chain)[:cut] + new[cut:]

    def churn(self) -> Iterator[Churn]:
        """Changes that leave the number of blocks as it is, until no cold chain is left."""
        rng = random.Random(SEED)
        step = 0
        ends: dict[int, int] = {}
        left = (self.chains - len(range(0, self.chains, HOT_EVERY))) * CHAIN_BLOCKS // CHURN_BLOCKS
        while left:
            at = step * CHURN_BLOCKS % CHAIN_BLOCKS
            fresh = 10**8 + step * CHURN_BLOCKS // CHAIN_BLOCKS
            chain = rng.randrange(self.chains)
            end = ends.get(chain, CHAIN_BLOCKS)
            if not chain % HOT_EVERY or end == 0:
                continue
            step += 1
            left -= 1
            ends[chain] = end - CHURN_BLOCKS
            removed = (chain, end - CHURN_BLOCKS, end)
            to = fresh % self.replicas
            yield Churn(to, (fresh, at, at + CHURN_BLOCKS), chain % self.replicas, removed)


def tokens(chain: int) -> list[int]:
    """The 4,096 token ids, 0 to 65,535, of a chain."""
    return array("H", random.Random(chain).randbytes(2 * CHAIN_TOKENS)).tolist()


def prefer_this(core: int) -> None:
    """Run on this core alone, before whatever else runs there, where that is permitted.

    Linux weighs sessions first (sched(7), autogroups), and the processes of each by their nice
    values.
    """
    os.sched_setaffinity(0, {core})
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        Path("/proc/self/autogroup").write_text("-20")
