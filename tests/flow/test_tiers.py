"""Blocks that left the device come back from the tiers: exactly, or not at all."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.tiered_engine import BLOCK_TOKENS, TieredEngine

# 32 KiB a block of the tiny model; on disk one unit more, for the checksum.
BLOCK_BYTES = 32_768
FILE_BYTES = BLOCK_BYTES + 4096
SIZES = (1, 31, 32, 33)


def tiers(folder: Path, host_blocks: int = 256, disk_blocks: int = 1000) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if host_blocks:
        section["host"] = {"bytes": host_blocks * BLOCK_BYTES}
    if disk_blocks:
        section["disk"] = {"path": str(folder / "disk"), "bytes": disk_blocks * FILE_BYTES}
    return section


def same(answer: dict[str, Any], hit: dict[str, Any]) -> None:
    """Greedy tokens, and the logprobs bit for bit."""
    assert answer["tokens"] == hit["tokens"]
    assert answer["logprobs"] == hit["logprobs"]
    assert len(hit["logprobs"]) == len(hit["tokens"]) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="module")
def hits(tiny_model: Path, folder: Path) -> dict[int, dict[str, Any]]:
    """What a device hit of each size answers. The engine that answered it has ended."""
    with TieredEngine(tiny_model, folder, tiers(folder)) as engine:
        return _hits(engine)


def _hits(engine: TieredEngine) -> dict[int, dict[str, Any]]:
    hits = {}
    for blocks in SIZES:
        cold = engine.run(blocks, blocks)
        assert cold["computed"] == blocks * BLOCK_TOKENS + 5
        assert cold["host_stored_bytes"] == cold["disk_stored_bytes"] == blocks * BLOCK_BYTES
        hits[blocks] = hit = engine.run(blocks, blocks)
        assert hit["device"] == blocks * BLOCK_TOKENS
        assert hit["tokens"] == cold["tokens"]
    return hits


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One whose device holds 64 blocks, so that other prompts displace them, and its hits."""
    folder = tmp_path_factory.mktemp("one")
    with TieredEngine(tiny_model, folder, tiers(folder), kv_bytes=64 * BLOCK_BYTES) as engine:
        yield engine, _hits(engine)
        assert engine.ask("cores", seconds=2.0) <= 0.1


class TestOneEngine:
    """Restores into the engine that stored them."""

    @pytest.mark.parametrize("blocks", SIZES)
    def test_a_displaced_prompt_comes_back_from_host_memory(
        self, engine: tuple[TieredEngine, dict[int, Any]], blocks: int
    ) -> None:
        """Tokens and logprobs equal a device hit's, and what is not of a full block is computed."""
        one, hits = engine
        for other in (101, 102):
            one.run(other, 31)
        assert one.ask("known") <= 64
        answer = one.run(blocks, blocks)
        same(answer, hits[blocks])
        assert answer["prompt_tokens_host"] == blocks * BLOCK_TOKENS
        assert answer["host_loaded_bytes"] == blocks * BLOCK_BYTES
        assert (answer["device"], answer["computed"]) == (0, 5)
        assert answer["prompt_tokens_received"] == answer["disk_loaded_bytes"] == 0

    @pytest.mark.parametrize("blocks", SIZES)
    def test_what_host_memory_lost_comes_back_from_disk(
        self, engine: tuple[TieredEngine, dict[int, Any]], blocks: int
    ) -> None:
        """The same, by way of the host tier, which has the blocks again afterwards."""
        one, hits = engine
        assert one.ask("reset", host=True)
        answer = one.run(blocks, blocks)
        same(answer, hits[blocks])
        assert answer["prompt_tokens_disk"] == blocks * BLOCK_TOKENS
        assert answer["disk_loaded_bytes"] == blocks * BLOCK_BYTES
        assert (answer["prompt_tokens_host"], answer["computed"]) == (0, 5)
        assert one.ask("reset", host=False)
        again = one.run(blocks, blocks)
        same(again, hits[blocks])
        assert again["prompt_tokens_host"] == blocks * BLOCK_TOKENS

    def test_part_of_a_prompt_may_be_on_the_device(
        self, engine: tuple[TieredEngine, dict[int, Any]]
    ) -> None:
        """A hit on the device is taken first, and the rest comes behind it."""
        one, hits = engine
        assert one.ask("reset", host=False)
        prefix = one.ask("run", seed=33, blocks=33, n=1, salt=None, first_blocks=9)
        assert prefix["prompt_tokens_host"] == 9 * BLOCK_TOKENS
        answer = one.run(33, 33)
        same(answer, hits[33])
        assert answer["device"] == 9 * BLOCK_TOKENS
        assert answer["prompt_tokens_host"] == 24 * BLOCK_TOKENS

    def test_the_catalogue_hears_of_each_tier_apart(
        self, engine: tuple[TieredEngine, dict[int, Any]]
    ) -> None:
        """Blocks in tiers are no device hits: dropped from the device, they are told of the tiers
        alone."""
        one, _ = engine
        one.run(7, 3)
        assert one.ask("known") >= 3
        assert one.ask("reset", host=False)
        one.run(8, 1)  # a step: vLLM tells of a reset with the next one
        assert one.ask("known") == 1
        one.run(7, 3)
        assert one.ask("known") == 4

    def test_an_erased_tenant_is_gone_from_every_tier(
        self, engine: tuple[TieredEngine, dict[int, Any]]
    ) -> None:
        """Its blocks are computed again and its bytes in host memory are overwritten; the other
        tenant's come back."""
        one, _ = engine
        for salt in ("aa.1", "bb.1"):
            one.run(5, 6, salt=salt)
        written = one.ask("host_blocks")
        assert one.ask("erase", tag="aa") == 6
        assert one.ask("host_blocks") == written - 6
        for host, source in ((False, "prompt_tokens_host"), (True, "prompt_tokens_disk")):
            assert one.ask("reset", host=host)
            assert one.run(5, 6, salt="bb.1")[source] == 6 * BLOCK_TOKENS
        assert one.run(5, 6, salt="aa.1")["computed"] == 6 * BLOCK_TOKENS + 5

    def test_preempted_requests_answer_as_alone(
        self, engine: tuple[TieredEngine, dict[int, Any]]
    ) -> None:
        """More requests than the device has blocks for: those that wait come back exactly."""
        one, _ = engine
        prompts = [(seed, 9) for seed in range(40, 46)]
        alone = [
            one.ask("run", seed=seed, blocks=blocks, n=90)["tokens"] for seed, blocks in prompts
        ]
        for host in (False, True):
            assert one.ask("reset", host=host)
            assert one.ask("burst", prompts=prompts, n=90) == alone
        assert one.ask("preemptions") > 0

    def test_forgetting_everything_forgets_the_tiers(
        self, engine: tuple[TieredEngine, dict[int, Any]]
    ) -> None:
        one, _ = engine
        one.run(8, 4)
        one.ask("forget")
        answer = one.run(8, 4)
        assert answer["computed"] == 4 * BLOCK_TOKENS + 5
        assert answer["prompt_tokens_host"] == answer["prompt_tokens_disk"] == 0


def test_a_fresh_process_finds_what_another_stored(
    tiny_model: Path, folder: Path, hits: dict[int, dict[str, Any]]
) -> None:
    """From disk, equal to a device hit in the process that stored it. A process that is killed
    leaves no shared memory behind."""
    before = _segments()
    engine = TieredEngine(tiny_model, folder, tiers(folder))
    try:
        for blocks, hit in hits.items():
            answer = engine.run(blocks, blocks)
            same(answer, hit)
            assert answer["prompt_tokens_disk"] == blocks * BLOCK_TOKENS
            assert answer["computed"] == 5
    finally:
        engine.kill()
    assert _segments() <= before


def _segments() -> set[Path]:
    return set(Path("/dev/shm").glob("vllm_offload_*"))


def test_a_damaged_block_is_computed_again(
    tiny_model: Path, folder: Path, hits: dict[int, dict[str, Any]]
) -> None:
    """Whichever block it is, the answer is a device hit's; one line says what happened, and what
    was computed is stored in its place."""
    files = sorted((folder / "disk").rglob("*.kv"))
    assert len(files) == sum(SIZES)
    flipped, cut = files[len(files) // 3], files[2 * len(files) // 3]
    content = bytearray(flipped.read_bytes())
    content[BLOCK_BYTES // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    with TieredEngine(tiny_model, folder, tiers(folder)) as engine:
        before = engine.log.read_text().count("disk tier: ")
        answers = {blocks: engine.run(blocks, blocks) for blocks in hits}
        for blocks, answer in answers.items():
            assert answer["tokens"] == hits[blocks]["tokens"]
            if not answer["failed_loads"]:
                same(answer, hits[blocks])
        failures = sum(answer["failed_loads"] for answer in answers.values())
        assert 1 <= failures <= 2  # both may be of one prompt
        assert sum(answer["computed"] for answer in answers.values()) > len(SIZES) * 5
        assert engine.log.read_text().count("disk tier: ") - before == failures
        assert engine.ask("reset", host=True)
        for blocks, hit in hits.items():
            answer = engine.run(blocks, blocks)
            assert answer["tokens"] == hit["tokens"]
            assert answer["prompt_tokens_disk"] == blocks * BLOCK_TOKENS


def test_a_disk_with_little_room_is_never_overrun(tiny_model: Path, tmp_path: Path) -> None:
    """The files stay within their budget at every moment, and answers stay right."""
    room = 10
    section = tiers(tmp_path, disk_blocks=room)
    largest, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not ended.wait(0.002):
            largest = max(largest, _disk_bytes(tmp_path / "disk"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with TieredEngine(tiny_model, tmp_path, section) as engine:
            cold = {seed: engine.run(seed, 20)["tokens"] for seed in range(4)}
            assert engine.ask("reset", host=True)
            restored = 0
            for seed in (3, 0, 1, 2, 3):
                answer = engine.run(seed, 20)
                assert answer["tokens"] == cold[seed]
                restored += answer["prompt_tokens_disk"]
    finally:
        ended.set()
        watcher.join()
    assert restored > 0
    assert (room - 1) * FILE_BYTES <= largest <= room * FILE_BYTES


def _disk_bytes(folder: Path) -> int:
    """Of the files that were all there at one moment; 0 if they changed meanwhile."""

    def listed() -> set[Path]:
        return set(folder.glob("slot-*/*/*/*/*"))

    files = listed()
    try:
        total = sum(path.stat().st_blocks * 512 for path in files)
    except FileNotFoundError:
        return 0
    return total if listed() == files else 0


def test_a_host_tier_smaller_than_a_prompt_ends_in_a_recompute(
    tiny_model: Path, tmp_path: Path
) -> None:
    """What does not fit is a miss: no request is fetched for ever, alone or beside others."""
    section = tiers(tmp_path, host_blocks=16)
    with TieredEngine(tiny_model, tmp_path, section) as engine:
        prompts = [(seed, 12) for seed in range(4)] + [(9, 33)]
        cold = [engine.run(*each)["tokens"] for each in prompts]
        for _ in range(3):
            assert engine.ask("reset", host=True)
            assert engine.ask("burst", prompts=prompts, n=8) == cold
        assert engine.ask("reset", host=True)
        answer = engine.run(0, 12)
        assert answer["tokens"] == cold[0]
        assert 0 < answer["prompt_tokens_disk"] <= 8 * BLOCK_TOKENS


def test_readers_of_one_prompt_share_a_fetch(tiny_model: Path, tmp_path: Path) -> None:
    """Requests with one prefix at once: each answer is right, and a block is read once."""
    with TieredEngine(tiny_model, tmp_path, tiers(tmp_path)) as engine:
        cold = engine.run(1, 24)["tokens"]
        assert engine.ask("reset", host=True)
        before = engine.ask("totals")
        assert engine.ask("burst", prompts=[(1, 24)] * 4, n=8) == [cold] * 4
        read = engine.ask("totals")["disk_loaded_bytes"] - before["disk_loaded_bytes"]
        assert read == 24 * BLOCK_BYTES


def test_disk_alone_and_host_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Each tier works without the other."""
    with TieredEngine(tiny_model, tmp_path, tiers(tmp_path, host_blocks=0)) as engine:
        engine.run(1, 4)
        assert engine.ask("reset", host=True)
        assert engine.run(1, 4)["prompt_tokens_disk"] == 4 * BLOCK_TOKENS
    with TieredEngine(tiny_model, tmp_path, tiers(tmp_path, disk_blocks=0)) as engine:
        engine.run(1, 4)
        assert engine.ask("reset", host=False)
        assert engine.run(1, 4)["prompt_tokens_host"] == 4 * BLOCK_TOKENS
        assert engine.ask("reset", host=True)
        assert engine.run(1, 4)["computed"] == 4 * BLOCK_TOKENS + 5


def test_handoffs_and_tiers_work_on_the_same_engines(tiny_model: Path, tmp_path: Path) -> None:
    """What a handoff brought goes into the tiers of the engine that took it; a prefill engine
    restores, computes the rest and hands off; and a request with a handoff takes nothing else."""
    section, blocks = tiers(tmp_path, disk_blocks=0), 20
    with (
        TieredEngine(tiny_model, tmp_path / "p", section, role="prefill") as prefill,
        TieredEngine(tiny_model, tmp_path / "d", section) as decode,
    ):
        cold = decode.run(1, blocks)["tokens"]
        assert decode.ask("reset", host=True)
        computed = prefill.ask("handoff", seed=1, blocks=blocks)
        assert computed["computed"] == blocks * BLOCK_TOKENS + 5
        taken = decode.ask("take", seed=1, blocks=blocks, handoff=computed["handoff"])
        assert taken["tokens"] == cold
        assert taken["prompt_tokens_received"] >= blocks * BLOCK_TOKENS
        assert taken["transfer_bytes"] >= blocks * BLOCK_BYTES
        assert taken["host_stored_bytes"] == blocks * BLOCK_BYTES

        assert decode.ask("reset", host=False)
        restored = decode.run(1, blocks)
        assert restored["tokens"] == cold
        assert restored["prompt_tokens_host"] == blocks * BLOCK_TOKENS
        assert restored["transfer_bytes"] == restored["prompt_tokens_received"] == 0

        prefill.ask("settle")
        assert prefill.ask("reset", host=False)
        again = prefill.ask("handoff", seed=1, blocks=blocks)
        assert again["prompt_tokens_host"] == blocks * BLOCK_TOKENS
        assert again["computed"] == 5
        assert decode.ask("reset", host=False)  # its host tier has the prompt too
        both = decode.ask("take", seed=1, blocks=blocks, handoff=again["handoff"])
        assert both["tokens"] == cold
        assert both["transfer_bytes"] >= blocks * BLOCK_BYTES
        assert both["prompt_tokens_host"] == both["failed_transfers"] == 0
        prefill.ask("settle")
        assert prefill.ask("cores", seconds=2.0) <= 0.1
