"""Tokens out are one plain engine's, and KV really moved."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.flow.cluster_process import Cluster
from tests.flow.plain_engine import greedy

pytestmark = pytest.mark.real_model
GENERATED = 24


def _text(paragraphs: int, seed: int) -> str:
    """English that differs with `seed`, so that no block is cached from another prompt."""
    rng = random.Random(seed)
    names = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Tony", "Frances")
    places = ("the harbour", "a library", "the old mill", "a quiet station", "the market")
    return "\n".join(
        f"{rng.choice(names)} walked to {rng.choice(places)} at {rng.randrange(24)} o'clock and "
        f"counted {rng.randrange(900)} lamps, of which {rng.randrange(90)} were lit."
        for _ in range(paragraphs)
    )


@pytest.fixture(scope="module")
def prompts(default_model: Path) -> dict[str, list[int]]:
    """Named prompts as token ids: shorter than a block, some blocks, and thousands of tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    texts = {"tiny": "The capital of France is", "block": _text(3, 1), "k1": _text(30, 2)}
    texts |= {"k2": _text(62, 3), "k4": _text(120, 4)}
    return {name: tokenizer.encode(text).ids for name, text in texts.items()}


@pytest.fixture(scope="module")
def truth(default_model: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    asked = [{"ids": ids, "n": GENERATED} for ids in prompts.values()]
    return dict(zip(prompts, greedy(default_model, asked), strict=True))


def _ask(client: OpenAI, ids: list[int], **options: Any) -> tuple[list[int], str, Any]:
    """Token ids, plan header and usage of one greedy completion."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    raw = client.completions.with_raw_response.create(
        model="smollm2",
        prompt=ids,
        max_tokens=GENERATED,
        temperature=0,
        extra_body={**extra, **options},
    )
    choice = json.loads(raw.text)["choices"][0]
    return choice["token_ids"], raw.headers["x-breakeven-plan"], raw.parse().usage


@pytest.mark.parametrize("name", ["tiny", "block", "k1", "k2", "k4"])
def test_tokens_equal_a_plain_engines(
    cluster: Cluster,
    client: OpenAI,
    prompts: dict[str, list[int]],
    truth: dict[str, list[int]],
    name: str,
) -> None:
    """Whatever the plan, the tokens are those of one plain engine; a remote plan moved the
    prompt's KV over NIXL, all of it, and no transfer failed."""
    before = cluster.total("transfer_bytes")
    tokens, plan, usage = _ask(client, prompts[name])
    assert tokens == truth[name]
    cluster.await_rest()
    moved = cluster.total("transfer_bytes") - before
    per_token = cluster.replicas()["decode-0"]["kv_bytes_per_token"]
    if plan.startswith("remote"):
        assert moved >= (len(prompts[name]) // 32) * 32 * per_token
    else:
        assert moved == 0
    assert cluster.total("failed_transfers") == 0
    assert usage.prompt_tokens == len(prompts[name])


def test_long_prompts_are_prefilled_remotely(client: OpenAI, prompts: dict[str, list[int]]) -> None:
    """A long prompt that nobody has cached is computed on the prefill replica."""
    fresh = prompts["k1"][::-1]
    _, plan, usage = _ask(client, fresh)
    assert plan.startswith(f"remote; hit=0 compute={len(fresh)}@prefill-0; predicted_ttft_ms=")
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_repeat_is_cached_and_says_so(
    client: OpenAI, prompts: dict[str, list[int]], truth: dict[str, list[int]]
) -> None:
    """Asked again, only the last partial block is computed, `cached_tokens` tells the truth,
    and the tokens stay the same."""
    _ask(client, prompts["k2"])
    tokens, plan, usage = _ask(client, prompts["k2"])
    cached = usage.prompt_tokens_details.cached_tokens
    assert tokens == truth["k2"]
    assert len(prompts["k2"]) - 32 <= cached < len(prompts["k2"])
    assert f"hit={cached}@" in plan


def test_another_salt_shares_nothing(client: OpenAI, prompts: dict[str, list[int]]) -> None:
    """A client's cache_salt separates its blocks: the same prompt under another salt computes
    everything, under the same salt again nearly nothing."""
    ids = prompts["block"]
    first, again, other = (
        _ask(client, ids, cache_salt=salt)[2].prompt_tokens_details.cached_tokens
        for salt in ("a", "a", "b")
    )
    assert (first, other) == (0, 0)
    assert again >= (len(ids) - 1) // 32 * 32


def test_streamed_tokens_equal_unstreamed_ones(
    client: OpenAI, prompts: dict[str, list[int]], truth: dict[str, list[int]]
) -> None:
    """A stream delivers each token once, in order."""
    stream = client.completions.create(
        model="smollm2",
        prompt=prompts["k1"],
        max_tokens=GENERATED,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    tokens = [t for chunk in stream for t in (chunk.choices[0].model_extra or {})["token_ids"]]
    assert tokens == truth["k1"]


def test_clients_cannot_steer_the_cluster(
    cluster: Cluster, client: OpenAI, prompts: dict[str, list[int]], truth: dict[str, list[int]]
) -> None:
    """Fields that address engines or connectors change nothing: same tokens, no transfer from
    an address of the client's choosing, no error."""
    steering = {
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "remote_engine_id": "evil",
            "remote_block_ids": [[1, 2, 3]],
            "remote_request_id": "x",
            "remote_host": "127.0.0.1",
            "remote_port": 1,
        },
        "priority": -1_000_000,
        "data_parallel_rank": 3,
        "vllm_xargs": {"kv_transfer_params": "x"},
    }
    tokens, _, _ = _ask(client, prompts["block"], **steering)
    assert tokens == truth["block"]
    assert cluster.total("failed_transfers") == 0
