"""Conversations that come back: who answers soonest, and how much of the history is reused.

Four conversations of six turns run at once on two engines, each turn resending all that was said;
three share a long system prompt. Only the router's policy differs, which is ordered while the
cluster runs: Breakeven's, plain prefix affinity without load terms, and round robin. There is no
prefill pool: the question is which cache a turn goes to.
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.result import Row, Store, at_least, at_most, quantile, shown, spread
from benchmarks.serve import clusters, load
from benchmarks.serve.clusters import Server
from benchmarks.serve.texts import words

PORT = 18144
CHAT = "/v1/chat/completions"
POLICIES = OURS, AFFINITY, ROBIN = ("breakeven", "prefix_affinity", "round_robin")
CONVERSATIONS = 4
SHARING = 3
BLOCK_TOKENS = 32
_SYSTEM_TOKENS = 600
_TURN_TOKENS = (100, 300)
_THINK_S = (0.2, 1.2)
_ANSWER_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Size:
    """Turns of a conversation, and rounds over all policies."""

    turns: int
    rounds: int


FULL = Size(turns=6, rounds=3)
QUICK = Size(turns=2, rounds=1)


def measure(quick: bool) -> list[Row]:
    """Rows of this part; what was measured of this commit is not measured again."""
    store, size = Store(__file__, quick), QUICK if quick else FULL
    # In another order each round: what drifts does not always meet the same.
    turns = [
        (POLICIES[(number + place) % len(POLICIES)], number)
        for number in range(size.rounds)
        for place in range(len(POLICIES))
    ]
    left = [turn for turn in turns if _key(*turn) not in store]
    if left:
        sections: dict[str, Any] = {"prefill": {"replicas": 0}, "decode": {"replicas": 2}}
        with clusters.ours("2 engines", PORT, sections, quick) as server:
            for policy, number in left:
                clusters.go_by(server, policy)
                store.get(_key(policy, number), partial(run, server, policy, number, size.turns))
    return _rows(store, size)


def _key(policy: str, number: int) -> str:
    return f"{policy}-{number}"


# ------------------------------------------------------------------ one run


def run(server: Server, policy: str, number: int, turns: int) -> dict[str, Any]:
    """All conversations of one round: the same lengths and pauses under each policy, in words of
    its own, since the engines still hold what the policy before it made them compute."""
    return asyncio.run(_run(server, policy, number, turns))


async def _run(server: Server, policy: str, number: int, turns: int) -> dict[str, Any]:
    # Never the same text twice on one cluster, also when a run goes on where it stopped.
    texts = random.Random(f"{policy} {number} {time.time_ns()}")
    shared = words(texts, _SYSTEM_TOKENS)
    async with load.client(server.url) as client:

        async def one(talk: int) -> list[load.Answer]:
            pace = random.Random(1000 * number + talk)
            system = shared if talk < SHARING else words(texts, _SYSTEM_TOKENS)
            await asyncio.sleep(0.4 * talk)
            return await _converse(client, pace, texts, system, turns)

        async def work() -> list[load.Answer]:
            talks = await asyncio.gather(*map(one, range(CONVERSATIONS)))
            return [answer for talk in talks for answer in talk]

        done = await load.timed(work)
    talks = [done.answers[n * turns : (n + 1) * turns] for n in range(CONVERSATIONS)]
    rows = [_turn(n, talk, at) for n, talk in enumerate(talks) for at in range(turns)]
    return {"turns": rows, "wall_s": done.wall_s, "client_share": done.client_share}


async def _converse(
    client: load.Client, pace: random.Random, texts: random.Random, system: str, turns: int
) -> list[load.Answer]:
    messages = [{"role": "system", "content": system}]
    answers = []
    for _ in range(turns):
        messages.append({"role": "user", "content": words(texts, pace.randint(*_TURN_TOKENS))})
        body = {"model": "smollm2", "messages": messages, "max_tokens": _ANSWER_TOKENS}
        fixed = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = await client.ask(CHAT, {**body, **fixed})
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer.text})
        await asyncio.sleep(pace.uniform(*_THINK_S))
    return answers


def _turn(number: int, talk: Sequence[load.Answer], at: int) -> dict[str, Any]:
    answer = talk[at]
    return {
        "conversation": number,
        "turn": at,
        "ttft_s": round(answer.ttft_s, 4),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "reusable_tokens": reusable(talk[:at], answer.prompt_token_ids),
        "plan": answer.plan,
    }


def reusable(before: Sequence[load.Answer], prompt: Sequence[int]) -> int:
    """Tokens of a prompt, in whole blocks, whose KV the conversation's own turns have made: those
    of a prompt and of its answer but the last, whose KV nobody computes. An answer that reads
    back as other tokens ends it; the prompt's own last token is always computed."""
    most = 0
    for answer in before:
        made = [*answer.prompt_token_ids, *answer.token_ids[:-1]]
        pairs = zip(made, prompt, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        most = max(most, min(same, len(prompt) - 1))
    return most // BLOCK_TOKENS * BLOCK_TOKENS


# ------------------------------------------------------------------ from runs to rows


def _mean_ttft_s(done: dict[str, Any]) -> float:
    return statistics.fmean(turn["ttft_s"] for turn in done["turns"])


def _rows(store: Store, size: Size) -> list[Row]:
    numbers = range(size.rounds)
    by_policy = {
        policy: [store.kept(_key(policy, number)) for number in numbers] for policy in POLICIES
    }
    targets = {ROBIN: 0.6, AFFINITY: 0.9}
    rows = [
        _against(by_policy[OURS], by_policy[policy], policy, target)
        for policy, target in targets.items()
    ]
    ours = [_reused(done) for done in by_policy[OURS]]
    name = "reusable blocks that were reused"
    rows.append(at_least(name, statistics.median(ours), "share", 0.9, spread(ours)))
    return rows + [row for policy, runs in by_policy.items() for row in _each(policy, runs)]


def _against(
    ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], policy: str, target: float
) -> Row:
    ratios = [_mean_ttft_s(a) / _mean_ttft_s(b) for a, b in zip(ours, other, strict=True)]
    name = f"mean TTFT of conversations, against {policy}"
    return at_most(name, statistics.median(ratios), "x", target, spread(ratios))


def _reused(done: dict[str, Any]) -> float:
    """Of what a conversation had made reusable, the share that was."""
    turns = [turn for turn in done["turns"] if turn["reusable_tokens"]]
    used = sum(min(int(t["cached_tokens"]), int(t["reusable_tokens"])) for t in turns)
    return used / max(1, sum(int(turn["reusable_tokens"]) for turn in turns))


def _each(policy: str, runs: Sequence[dict[str, Any]]) -> list[Row]:
    means = [_mean_ttft_s(done) for done in runs]
    turns = [turn for done in runs for turn in done["turns"]]
    ttft = [turn["ttft_s"] for turn in turns]
    cached = sum(turn["cached_tokens"] for turn in turns)
    share = cached / sum(turn["prompt_tokens"] for turn in turns)
    reused = statistics.median(_reused(done) for done in runs)
    client = max(done["client_share"] for done in runs)
    tail = f"p50 {quantile(ttft, 0.5):.2f}, p99 {quantile(ttft, 0.99):.2f} s"
    reuse = f"{share:.0%} of all prompt tokens cached, {reused:.0%} of the reusable"
    detail = f"{spread(means, 's')}; {tail}; {reuse}; client {client:.2f} cores"
    return [shown(f"{policy}: mean TTFT of conversations", statistics.median(means), "s", detail)]
