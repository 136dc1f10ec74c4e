"""Erasing a tenant's cached blocks on every replica, and what each of them did."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from router.member import Member
from workers.errors import ReplicaLostError

# An order waits for the step under way, which may compute a long chunk of a prompt.
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replica did: `blocks` erased, `in_use` of them still read by running requests;
    or a complaint, and then the tenant's blocks may still be there."""

    name: str
    blocks: int = 0
    in_use: int = 0
    complaint: str | None = None


async def forget(
    members: Iterable[Member], tags: tuple[str, ...], timeout_s: float = TIMEOUT_S
) -> list[Outcome]:
    """Have all replicas erase the blocks of these tags, at the same time."""
    return list(await asyncio.gather(*(_one(member, tags, timeout_s) for member in members)))


async def _one(member: Member, tags: tuple[str, ...], timeout_s: float) -> Outcome:
    if not member.up:
        return Outcome(member.name, complaint="is down; forget again if it comes back by itself")
    try:
        async with asyncio.timeout(timeout_s):
            done = await member.forget(tags)
    except TimeoutError:
        return Outcome(member.name, complaint=f"no answer in {timeout_s:g} s; forget again")
    except ReplicaLostError as error:
        return Outcome(member.name, complaint=f"{error.complaint}; forget again")
    return Outcome(member.name, done.blocks, done.in_use)
