"""Tiers behind models whose layers are of several kinds: exact, or refused at start."""

from pathlib import Path
from typing import Any

import pytest

from tests.flow.test_tiers import same
from tests.flow.tiered_engine import BLOCK_TOKENS, TieredEngine
from tests.kind_model import HYBRID, LATENT, SLIDING, kind_model

NO_TOKENIZER = {"skip_tokenizer_init": True}
# vLLM makes a block of the hybrid's attention as long as a layer's state.
HYBRID_BLOCK_TOKENS = 544
# Two of those and a rest; more than eight windows.
BLOCKS = 36


def section(folder: Path, host_bytes: int = 1 << 26) -> dict[str, Any]:
    return {
        "host": {"bytes": host_bytes},
        "disk": {"path": str(folder / "disk"), "bytes": 1 << 28},
    }


def engine(model: Path, folder: Path, tiers: dict[str, Any], **options: Any) -> TieredEngine:
    return TieredEngine(model, folder, tiers, engine={**NO_TOKENIZER, **options})


@pytest.mark.parametrize(
    ("config", "options", "block_tokens"),
    [(SLIDING, {}, BLOCK_TOKENS), (HYBRID, {"dtype": "bfloat16"}, HYBRID_BLOCK_TOKENS)],
    ids=["sliding", "hybrid"],
)
def test_every_kind_of_layer_comes_back_exactly(
    config: dict[str, Any], options: dict[str, Any], block_tokens: int, tmp_path: Path
) -> None:
    """From host memory, from disk, and from disk in a fresh process: tokens and logprobs are those
    of a device hit of an engine without tiers."""
    model = kind_model(tmp_path / "model", config)
    prompts = [(1, BLOCKS), (2, BLOCKS // 2)]
    with engine(model, tmp_path, {}, **options) as plain:
        cold = [plain.run(*each) for each in prompts]
        hits = [plain.run(*each) for each in prompts]
    for (_, blocks), first, hit in zip(prompts, cold, hits, strict=True):
        assert first["tokens"] == hit["tokens"]
        assert hit["device"] == blocks * BLOCK_TOKENS // block_tokens * block_tokens
    with engine(model, tmp_path, section(tmp_path), **options) as tiered:
        for each, first in zip(prompts, cold, strict=True):
            assert tiered.run(*each)["tokens"] == first["tokens"]
        for host, source in ((False, "prompt_tokens_host"), (True, "prompt_tokens_disk")):
            assert tiered.ask("reset", host=host)
            _restored(tiered, prompts, hits, source)
    with engine(model, tmp_path, section(tmp_path), **options) as fresh:
        _restored(fresh, prompts, hits, "prompt_tokens_disk")


def _restored(
    engine: TieredEngine,
    prompts: list[tuple[int, int]],
    hits: list[dict[str, Any]],
    source: str,
) -> None:
    for each, hit in zip(prompts, hits, strict=True):
        answer = engine.run(*each)
        assert (answer[source], answer["computed"]) == (hit["device"], hit["computed"])
        same(answer, hit)


def test_a_short_row_keeps_nothing_of_the_block_before_it(tmp_path: Path) -> None:
    """A group of one layer fills half of a row that was another tenant's: once that tenant is
    erased, no piece of its KV is left in host memory."""
    model = kind_model(tmp_path / "model", SLIDING)
    with engine(model, tmp_path, section(tmp_path, host_bytes=24 * 32_768)) as tiered:
        for blocks in range(3, 9):  # rows go from group to group as lengths change
            tiered.run(100 + blocks, 6, salt="aa.1")
            assert tiered.ask("remember", tag="aa") > 100
            assert tiered.ask("remembered") > 100
            tiered.run(200 + blocks, blocks, salt="bb.1")
            tiered.ask("erase", tag="aa")
            assert tiered.ask("remembered") == 0


def test_latent_attention_without_a_prefix_cache_is_refused(tmp_path: Path) -> None:
    """vLLM's CPU engine serves it so; the error names the kind, the reason and the remedy."""
    model = kind_model(tmp_path / "model", LATENT)
    with pytest.raises(AssertionError, match="the engine ended"):
        engine(model, tmp_path, section(tmp_path))
    log = (tmp_path / "engine.log").read_text()
    assert "TierError" in log
    assert "MLAAttentionSpec without a prefix cache" in log
    assert "set tiers.host and tiers.disk to null" in log
