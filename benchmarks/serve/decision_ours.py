"""Our side of `decision.py`: one process, one core, told what to do by lines of JSON.

The code under test is the router's own, from the token list to the plan's header; workers are
`Member`s whose links lead nowhere, and what they say comes as the frames that they would send.
"""

import gc
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from decision_load import BLOCK_TOKENS, CHAIN_BLOCKS, Churn, prefer_this
from decision_load import Load as Workload
from decision_load import tokens as chain_tokens

from kv.block import chain, pack_tokens, root_key, split_keys
from kv.catalogue import Tier
from kv.curve import LinkCurve
from kv.plan import Plan
from router.catalogue.holdings import Expectations, Holdings, deepest
from router.catalogue.wire import Beat, Found
from router.member import Member
from router.pauses import freeze_start
from router.planner import Prices
from router.policy.pair import choose
from router.policy.question import Question
from router.pools import Pools
from workers.messages import (
    Blocks,
    Load,
    Replica,
    Request,
    Role,
    TierLoad,
    Welcome,
    decode_reply,
    encode,
)

ROOT_KEY = root_key("tenant")
# Chains named and encoded before the catalogue is timed taking them in.
BATCH = 256
PRICES = Prices()
# A tiered load's vault brings 4,096 tokens in about the time in which they are computed, where
# most ways of splitting a prompt are worth pricing; its host tiers hold other prompts.
VAULT = TierLoad(0, 0, 2e-3, 1 / 2.5e9, samples=8)
HOST = TierLoad(0, 0, 1e-3, 1 / 20e9, samples=8)


class Longest:
    """The longest of many steps, by the clock and by this thread's own time on its core.

    They differ where another process, or the machine's host, ran in between.
    """

    def __init__(self) -> None:
        self.wall_ns = self.cpu_ns = self.spent_ns = 0

    def __enter__(self) -> None:
        self._cpu_ns, self._wall_ns = time.thread_time_ns(), time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        wall_ns = time.perf_counter_ns() - self._wall_ns
        cpu_ns = time.thread_time_ns() - self._cpu_ns
        self.spent_ns += wall_ns
        self.wall_ns, self.cpu_ns = max(self.wall_ns, wall_ns), max(self.cpu_ns, cpu_ns)

    def shown(self) -> dict[str, float]:
        return {"longest_ms": self.wall_ns / 1e6, "longest_cpu_ms": self.cpu_ns / 1e6}


class Nowhere:
    """A link to a replica that never answers."""

    def send(self, request: Request) -> None:
        pass

    def close(self) -> None:
        pass


class Router:
    """What an ingress has of the decision, and the frames that keep it busy."""

    def __init__(self, load: Workload) -> None:
        self.load = load
        self.holdings, self.expected = Holdings(), Expectations()
        self.members: dict[str, Member] = {}
        self.pools = Pools(self.members, self.expected.taken)
        self.names = [_name(index) for index in range(load.replicas)]
        rng = random.Random(load.replicas)
        self.links = {}
        for index, name in enumerate(self.names):
            replica = _replica(index, name, rng, load.kind == "tiered")
            member = Member(
                replica,
                lambda member: Nowhere(),
                self.follow,
                time.monotonic,
                on_change=self.pools.touch,
            )
            self.members[name] = member
            member.receive(Welcome(replica))
            member.receive(Blocks(0, snapshot=True))
            member.receive(decode_reply(self._load(rng), name))
        for p, d in itertools.product(self.names[::2], self.names[1::2]):
            latency_s, gb_s = rng.uniform(1e-3, 5e-3), rng.uniform(5, 50)
            self.links[(p, d)] = LinkCurve(latency_s, 1e-9 / gb_s)
        self.sequences = [0] * load.replicas
        # Caches are full, and a tenth of what leaves them is asked for again.
        full = {member.replica.epoch: member.replica.kv_blocks for member in self.members.values()}
        self.beat = Beat(blocks=full, regret=0.1)
        self.churn = self._frames(load.churn())
        self.rng = rng

    def follow(self, member: Member, blocks: Blocks) -> None:
        """As the catalogue's node does."""
        self.holdings.follow(member.replica.epoch, blocks)

    def receive(self, replica: int, frame: bytes) -> None:
        """A frame, as it arrives from a worker."""
        name = self.names[replica]
        self.members[name].receive(decode_reply(frame, name))

    def frame(
        self, replica: int, stored: bytes, removed: bytes = b"", tier: Tier = Tier.DEVICE
    ) -> bytes:
        """What a worker says of its blocks."""
        self.sequences[replica] += 1
        return encode(Blocks(self.sequences[replica], stored, removed, tier=tier))

    def fill(self) -> dict[str, float]:
        """Every chain of the load, as frames of at most one chain."""
        before, taking, blocks = _rss(), Longest(), 0
        for first in range(0, self.load.chains, BATCH):
            frames = []
            for number in range(first, min(first + BATCH, self.load.chains)):
                keys = b"".join(_keys(chain_tokens(number)))
                for replica, depth in self.load.holdings(number):
                    frames.append((replica, self.frame(replica, keys[: 16 * depth])))
                    blocks += depth
                if self.load.kind == "tiered":
                    holder = number % self.load.replicas
                    frames.append((holder, self.frame(holder, keys, tier=Tier.VAULT)))
                    blocks += CHAIN_BLOCKS
            for replica, frame in frames:
                with taking:
                    self.receive(replica, frame)
        kept = self.load.chains * CHAIN_BLOCKS
        return {
            "blocks": kept,
            "ingest_blocks_s": blocks / taking.spent_ns * 1e9,
            "bytes_a_block": (_rss() - before) / kept,
            **taking.shown(),
        }

    def decide(self, tokens: list[int]) -> tuple[tuple[int, int, int, int], Plan]:
        """One decision, priced as ingresses do: when it, its lookup and its scoring began, its end
        in ns, and the plan."""
        began = time.perf_counter_ns()
        keys = chain(ROOT_KEY, pack_tokens(tokens)[:-4], BLOCK_TOKENS)
        hashed = time.perf_counter_ns()
        # As the catalogue gets them, from another process: one string of bytes.
        found = self.holdings.look("ingress", split_keys(b"".join(keys)))
        looked = time.perf_counter_ns()
        depths = deepest(found.depths, self.expected.depths(keys))
        held = Found(depths, found.taken, found.tiers)
        snapshot = self.pools.snapshot(held, self.links, beat=self.beat).without(())
        question = Question(
            len(tokens),
            snapshot,
            PRICES.assumed_streams,
            compute_price=PRICES.compute_price,
            hysteresis=PRICES.hysteresis,
            displaced_price=PRICES.displaced_price,
        )
        plan = choose(question)
        return (began, hashed, looked, time.perf_counter_ns()), plan

    def round(self, decisions: int, seed: int) -> dict[str, object]:
        """Decisions, each behind one change of the blocks and one of the load of whom it chose."""
        prompts, churn = self.load.prompts(seed), self.churn
        spans, deciding, churning, churned_us = [], Longest(), Longest(), []
        shapes: Counter[str] = Counter()
        for tokens, frames in zip(itertools.islice(prompts, decisions), churn, strict=False):
            before_ns = churning.spent_ns
            with churning:
                for replica, frame in frames:
                    self.receive(replica, frame)
            churned_us.append((churning.spent_ns - before_ns) / 1e3)
            with deciding:
                at, plan = self.decide(tokens)
            spans.append(at)
            shapes[plan.shape] += 1
            for name in (plan.prefill, plan.decode):
                if name is not None:
                    self.members[name].receive(decode_reply(self._load(self.rng), name))
        return {
            "decision_us": [(at[3] - at[0]) / 1e3 for at in spans],
            "hashing_us": [(at[1] - at[0]) / 1e3 for at in spans],
            "lookup_us": [(at[2] - at[1]) / 1e3 for at in spans],
            "scoring_us": [(at[3] - at[2]) / 1e3 for at in spans],
            "churn_us": churned_us,
            "shapes": shapes,
            "longest_decision": deciding.shown(),
            "longest_churn": churning.shown(),
        }

    def restart(self) -> dict[str, float]:
        """A replica dies: forget it, then sweep, shard by shard."""
        self.holdings.forget(self.members[self.names[0]].replica.epoch)
        sweeping, left = Longest(), 1
        while left:
            with sweeping:
                left = self.holdings.sweep(1)
        return sweeping.shown()

    def _frames(self, churn: Iterator[Churn]) -> Iterator[list[tuple[int, bytes]]]:
        for change in churn:
            added, removed = _cut(change.added), _cut(change.removed)
            yield [
                (change.adds_to, self.frame(change.adds_to, added)),
                (change.removes_from, self.frame(change.removes_from, b"", removed)),
            ]

    def _load(self, rng: random.Random) -> bytes:
        pending = rng.choice((0, 0, rng.randrange(8000)))
        return encode(
            Load(
                waiting=rng.randrange(3),
                running=rng.randrange(40),
                pending_prefills=min(pending, 2),
                pending_prefill_tokens=pending,
                tiers={Tier.HOST: HOST, Tier.VAULT: VAULT} if self.load.kind == "tiered" else {},
            )
        )


def _name(index: int) -> str:
    return f"{'decode' if index % 2 else 'prefill'}-{index // 2}"


def _replica(index: int, name: str, rng: random.Random, lends: bool) -> Replica:
    slow = rng.uniform(0.8, 1.2)
    return Replica(
        name=name,
        role=Role.DECODE if index % 2 else Role.PREFILL,
        epoch=f"{name}/1",
        address="",
        node="",
        pid=0,
        model="",
        block_tokens=BLOCK_TOKENS,
        kv_bytes_per_token=131072,
        kv_blocks=10**6,
        max_num_seqs=64,
        prefill_samples=((512, 0, 0.02 * slow), (4096, 0, 0.2 * slow), (8192, 0, 0.45 * slow)),
        step_s=0.01 * slow,
        peer_address=f"tcp://{name}" if lends else "",
        room_tokens=10**5 if lends else 0,
    )


def _keys(tokens: list[int]) -> list[bytes]:
    return chain(ROOT_KEY, pack_tokens(tokens), BLOCK_TOKENS)


def _cut(part: tuple[int, int, int]) -> bytes:
    number, start, end = part
    return b"".join(_keys(chain_tokens(number))[start:end])


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


class Collections:
    """The longest pause of Python's cyclic garbage collector."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._began = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - self._began) * 1e3)


def main() -> None:
    blocks, replicas, core = map(int, sys.argv[1:4])
    freeze_start()
    prefer_this(core)
    collections = Collections()
    router = Router(Workload(blocks, replicas, *sys.argv[4:]))
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "fill":
            answer: dict[str, object] = dict(router.fill())
        elif order["do"] == "round":
            answer = dict(router.round(order["decisions"], order["seed"]))
        else:
            answer = dict(router.restart())
        answer["gc_longest_ms"], collections.longest_ms = collections.longest_ms, 0.0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
