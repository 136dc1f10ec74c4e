"""Pairs of replicas: which have been introduced to each other, and what their link costs.

The first transfer between two NIXL agents pays for a handshake, and a prefill replica that dies
unmet costs its decode replica about 5 s (FACTS). So each pair moves two small prompts before it
is routable, and those give the first link curve; requests that are handed off move it then.
"""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType

from kv.block import pack_tokens
from kv.curve import LinkCurve, TransferSample, fit_link
from kv.errors import KVError
from kv.live import RETRY_S, TYPICAL_TOKENS, LiveLink
from router.curve_book import LEAST_SAMPLES, KeptLink
from router.member import Member
from workers.errors import ReplicaLostError, WorkerError
from workers.messages import Handoff, Role, Submit

logger = logging.getLogger(__name__)

NOTHING_KEPT: Mapping[str, KeptLink] = MappingProxyType({})

_TIMEOUT_S = 60.0
_RETRY_S = 1.0
# Blocks of the prompts moved: the first meets the peer, the others are timed, the best of each.
_MEET_BLOCKS, _TIMED_BLOCKS = 1, (2, 8, 2, 8)
# Token ids that every vocabulary of a text model has.
_VOCABULARY = 1000


class Pairs:
    """The warmed (prefill, decode) pairs. `body` is an engine request for one greedy token; `kept`
    is what earlier clusters knew of links, by what they join."""

    def __init__(
        self,
        body: bytes,
        rng: random.Random,
        kept: Mapping[str, KeptLink] = NOTHING_KEPT,
        retry_s: float | None = RETRY_S,
    ) -> None:
        self._body, self._random, self._kept, self._retry_s = body, rng, kept, retry_s
        # One introduction at a time for a replica: two would time each other.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._links: dict[tuple[str, str], LinkCurve] = {}
        self._live: dict[tuple[str, str], LiveLink] = {}
        self._warming: dict[tuple[str, str], asyncio.Task[None]] = {}

    @property
    def links(self) -> Mapping[tuple[str, str], LinkCurve]:
        """The routable pairs, each with the cost of its link. Never changed in place."""
        return self._links

    def warm(
        self, prefill: Iterable[Member], decode: Iterable[Member], tasks: asyncio.TaskGroup
    ) -> None:
        """Begin to introduce whoever has not met yet, and stays."""
        decode = tuple(filter(_stays, decode))
        for p in filter(_stays, prefill):
            for d in decode:
                pair = (p.name, d.name)
                if pair not in self._links and pair not in self._warming:
                    task = tasks.create_task(self._introduce(p, d))
                    self._warming[pair] = task
                    task.add_done_callback(partial(self._warmed, pair))

    def cool(self, name: str) -> None:
        """Every pair of this replica is void: it restarted, hung or left."""
        self._links = {pair: link for pair, link in self._links.items() if name not in pair}
        self._live = {pair: live for pair, live in self._live.items() if pair in self._links}

    def saw(self, pair: tuple[str, str], sample: TransferSample, now_s: float) -> None:
        """A handoff of one request; ignored for a pair that is not warmed."""
        if (live := self._live.get(pair)) is not None:
            live.saw(sample, now_s)

    def told(self, pair: tuple[str, str], now_s: float) -> bool:
        """Bring a pair's link up to date; whether it has changed."""
        live = self._live.get(pair)
        if live is None or (curve := live.curve(now_s)) == self._links[pair]:
            return False
        self._links = {**self._links, pair: curve}
        return True

    def live(self, pair: tuple[str, str]) -> LiveLink | None:
        """What requests told of a pair."""
        return self._live.get(pair)

    def fading(self) -> list[tuple[str, str]]:
        """The pairs whose links change while nothing is seen of them."""
        return [pair for pair, live in self._live.items() if live.fades]

    def _warmed(self, pair: tuple[str, str], _: "asyncio.Task[None]") -> None:
        del self._warming[pair]

    def worth_keeping(self, members: Mapping[str, Member], now_s: float) -> dict[str, KeptLink]:
        """By what they join, the curve of that link of which most is known."""
        kept: dict[str, KeptLink] = {}
        for (p, d), live in self._live.items():
            if p not in members or d not in members:
                continue
            kind = joined(members[p], members[d])
            enough = max(LEAST_SAMPLES, kept[kind].samples if kind in kept else 0)
            if live.samples >= enough:
                curve = live.curve(now_s)
                kept[kind] = KeptLink(curve.latency_s, curve.per_byte_s, live.samples)
        return kept

    async def _introduce(self, prefill: Member, decode: Member) -> None:
        try:
            # Others come first: their time is not this pair's.
            async with self._locks[prefill.name], self._locks[decode.name]:
                if not (_stays(prefill) and _stays(decode)):  # while they waited for their turn
                    return
                async with asyncio.timeout(_TIMEOUT_S):
                    curve = await self._measure(prefill, decode)
        except (WorkerError, KVError, TimeoutError) as error:
            logger.warning("%s and %s not warmed: %s", prefill.name, decode.name, error)
            await asyncio.sleep(_RETRY_S)
            return
        if prefill.up and decode.up:
            pair = prefill.name, decode.name
            typical_bytes = TYPICAL_TOKENS * decode.replica.kv_bytes_per_token
            if (kept := self._kept.get(joined(prefill, decode))) is not None:
                curve = min(curve, kept.curve(), key=lambda each: each.seconds(typical_bytes))
            self._live[pair] = LiveLink(curve, typical_bytes, self._retry_s)
            self._links = {**self._links, pair: curve}

    async def _measure(self, prefill: Member, decode: Member) -> LinkCurve:
        """What the link costs at its best: what stands in its way is priced as a queue."""
        await self._move(prefill, decode, _MEET_BLOCKS)
        best: dict[int, TransferSample] = {}
        for blocks in _TIMED_BLOCKS:
            sample = await self._move(prefill, decode, blocks)
            known = best.get(sample.n_bytes, sample)
            best[sample.n_bytes] = min(sample, known, key=lambda each: each.seconds)
        return fit_link(list(best.values()))

    async def _move(self, prefill: Member, decode: Member, blocks: int) -> TransferSample:
        """Seconds from a handoff in hand to D's first token, when `blocks` are moved."""
        n_tokens = blocks * prefill.replica.block_tokens
        tokens = pack_tokens([self._random.randrange(_VOCABULARY) for _ in range(n_tokens)])
        name = f"warm-{self._random.getrandbits(64):016x}"

        def release(handoff: Handoff) -> None:
            decode.release(f"{name}.release", handoff)

        ask = Submit(name, Role.PREFILL, tokens, self._body)
        async with prefill.run(ask, unread=release) as deltas:
            handoff = [delta async for delta in deltas][-1].handoff
        if handoff is None:
            raise ReplicaLostError(prefill.name, f"{name} ended without a handoff")
        began = asyncio.get_running_loop().time()
        try:
            take = Submit(name, Role.DECODE, tokens, self._body, handoff)
            async with decode.run(take) as deltas:
                with prefill.read_by(decode, name):
                    async for _ in deltas:
                        break
        except WorkerError:
            release(handoff)
            raise
        seconds = asyncio.get_running_loop().time() - began
        return TransferSample(n_tokens * prefill.replica.kv_bytes_per_token, seconds)


def _stays(member: Member) -> bool:
    """One that goes would leave a handoff unread, whose blocks stay until their lease ends."""
    return member.up and not member.load.draining


def joined(prefill: Member, decode: Member) -> str:
    """What a link is between: two links of one kind are alike."""
    source, destination = prefill.replica, decode.replica
    nodes = "one node" if source.node == destination.node else "two nodes"
    return f"{source.hardware} to {destination.hardware}, {nodes}"
