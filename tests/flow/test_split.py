"""One replica computes a prompt's head while another fetches its tail: exactly, and in time,
whatever becomes of either source."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.splitting_engine import SplittingEngine
from tests.flow.tiered_engine import BLOCK_TOKENS, TieredEngine
from tests.vault.shard_process import MIB, ShardHandle, shard
from tests.waiting import await_that
from workers.vault.pages import FORMAT

BLOCK_BYTES = 32_768
BLOCKS, HEAD = 32, 16
ANSWER_S = 1.0  # a peer that does not answer for so long is lost
TIERS = {
    "host": {"bytes": 256 * BLOCK_BYTES},
    "peer": {"timeout_s": ANSWER_S},
    "vault": {"shards": 1, "memory_bytes": 64 * MIB},
}
# A chunk of the head; its blocks can be lent a step after it was computed.
CHUNK_BLOCKS = 4
CHUNKED = {"max_num_batched_tokens": CHUNK_BLOCKS * BLOCK_TOKENS}
SEEDS = iter(range(1_000, 2_000))
# What a busy machine adds.
SLACK_S = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture
def vault(folder: Path) -> Iterator[ShardHandle]:
    """One for each test, since some end it."""
    own = folder / f"shard-{time.time_ns()}"
    own.mkdir()
    with shard(own, fingerprint=FORMAT) as handle:
        yield handle


def engine(model: Path, folder: Path, **more: Any) -> SplittingEngine:
    nobody = {"vault-0": "tcp://127.0.0.1:21599"}
    return SplittingEngine(model, folder, TIERS, nobody, up_s=0.0, **more)


@pytest.fixture(scope="module")
def decode(tiny_model: Path, folder: Path) -> Iterator[SplittingEngine]:
    with engine(tiny_model, folder / "decode") as made:
        made.ask("rests", first_s=0.05)
        yield made


class Prefill:
    """A prefill replica that tests may end; the next one gets another."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder, self._made = model, folder, 0
        self.engine = self._new()

    def alive(self) -> SplittingEngine:
        if self.engine.process.poll() is not None:
            self.end()
            self.engine = self._new()
        return self.engine

    def end(self) -> None:
        self.engine.kill()
        for pipe in (self.engine.process.stdin, self.engine.process.stdout):
            if pipe is not None:
                pipe.close()

    def send(self, number: signal.Signals) -> None:
        self.engine.process.send_signal(number)

    def _new(self) -> SplittingEngine:
        self._made += 1
        own = self._folder / f"prefill-{self._made}"
        return engine(self._model, own, role="prefill", engine=CHUNKED)


@pytest.fixture(scope="module")
def prefills(tiny_model: Path, folder: Path) -> Iterator[Prefill]:
    made = Prefill(tiny_model, folder)
    try:
        yield made
    finally:
        made.end()


class Split:
    """A prompt that the vault has, and a plan to split it."""

    def __init__(
        self, decode: SplittingEngine, prefill: SplittingEngine, vault: ShardHandle
    ) -> None:
        self.decode, self.prefill, self.seed = decode, prefill, next(SEEDS)
        self.name = f"request.{self.seed}"
        for each in (decode, prefill):
            assert each.ask("seat", addresses={vault.name: vault.seat.address})
        self.whole = decode.run(self.seed, BLOCKS, hints={})
        assert self.whole["vault_stored_bytes"] == BLOCKS * BLOCK_BYTES
        # A device hit computes what a split computes.
        self.hit = decode.run(self.seed, BLOCKS)
        assert decode.ask("reset", host=True)

    def begin(self, step_s: float = 0.0, head_deadline_s: float = 10.0) -> None:
        """Each step of the prefill replica takes so much longer."""
        self.prefill.ask("slow_steps", seconds=step_s)
        hints = {
            "reach_tokens": BLOCKS * BLOCK_TOKENS,
            "tiers": ["vault"],
            "deadline_s": head_deadline_s + 10.0,
            "peer": self.prefill.ask("address"),
            "head_tokens": HEAD * BLOCK_TOKENS,
            "head_deadline_s": head_deadline_s,
        }
        asked = {"work": self.name, "seed": self.seed, "blocks": BLOCKS}
        self.decode.ask("submit", **asked, hints=hints)
        self.prefill.ask("submit", **asked, head_blocks=HEAD)

    def head(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.prefill.ask("collect", work=self.name)
        return answer

    def answer(self) -> dict[str, Any]:
        """What the decode replica says: whatever happened, tokens are exact. So are logprobs, but
        for what a chunk of another size changes in the last bits of a head."""
        answer: dict[str, Any] = self.decode.ask("collect", work=self.name)
        assert answer["tokens"] == self.hit["tokens"] == self.whole["tokens"]
        assert answer["logprobs"] == pytest.approx(self.hit["logprobs"], abs=1e-4)
        assert sum(answer["sources"].values()) == BLOCKS * BLOCK_TOKENS + 5
        assert answer["prompt_tokens_received"] == 0
        return answer

    def await_some_of_the_head(self) -> None:
        """The tail is in, and the head's first chunk."""
        enough = BLOCKS - HEAD + CHUNK_BLOCKS
        await_that(lambda: self.decode.ask("held") >= enough, "a chunk of the head", 20.0)
        assert self.decode.ask("held") < BLOCKS, "the head was computed too soon for this test"


@pytest.fixture
def split(decode: SplittingEngine, prefills: Prefill, vault: ShardHandle) -> Iterator[Split]:
    """The decode replica's books balance afterwards."""
    made = Split(decode, prefills.alive(), vault)
    yield made
    books = ("loans", "lent", "pinned")
    await_that(lambda: not any(decode.ask("lending")[at] for at in books), "nothing is held", 10.0)
    assert decode.ask("books")["jobs"] == 0
    if prefills.engine.process.poll() is None:
        prefills.engine.ask("slow_steps", seconds=0.0)


def from_both(head: int, tail: int, computed: int = 5) -> dict[str, int]:
    """Sources of blocks from the peer and from the vault."""
    tokens = {"computed": computed, "peer": head * BLOCK_TOKENS, "vault": tail * BLOCK_TOKENS}
    return {source: count for source, count in tokens.items() if count}


def test_a_split_is_exact_and_comes_from_both_sides(split: Split, tiny_model: Path) -> None:
    """Tokens are those of a plain engine; the head came from the peer, the
    tail from the vault, and nothing was handed off or is lent still."""
    with TieredEngine(tiny_model, split.decode.log.parent / "plain", {}) as plain:
        assert plain.run(split.seed, BLOCKS)["tokens"] == split.whole["tokens"]
    split.begin()
    head, answer = split.head(), split.answer()
    assert answer["sources"] == from_both(HEAD, BLOCKS - HEAD)
    assert answer["peer_loaded_bytes"] == HEAD * BLOCK_BYTES
    assert answer["vault_loaded_bytes"] == (BLOCKS - HEAD) * BLOCK_BYTES
    assert answer["failed_loads"] == 0
    assert head["sources"] == {"computed": HEAD * BLOCK_TOKENS}
    assert head["handoff"] is None
    assert head["vault_loaded_bytes"] == 0
    await_that(lambda: split.prefill.ask("lending")["lent"] == 0, "given back", 5.0)
    assert split.prefill.ask("lending")["pinned"] == 0


def test_both_sides_are_fetched_while_the_head_is_computed(split: Split) -> None:
    """The tail at once, the head chunk by chunk; a short while after its end all is there."""
    split.begin(step_s=0.3)
    split.await_some_of_the_head()
    head, answer = split.head(), split.answer()
    assert answer["sources"] == from_both(HEAD, BLOCKS - HEAD)
    chunks = HEAD // CHUNK_BLOCKS
    assert head["first_s"] >= 0.3 * chunks
    assert answer["first_s"] <= head["first_s"] + 0.5


def test_a_split_takes_as_long_as_its_slower_side(split: Split) -> None:
    """Little more than half of what fetching all takes, where a chunk takes as long to fetch as to
    compute."""
    chunk_s, chunks = 0.2, BLOCKS // CHUNK_BLOCKS
    split.decode.ask("slow_vault", block_s=chunk_s / CHUNK_BLOCKS)
    try:
        fetched = split.decode.run(split.seed, BLOCKS)
        assert fetched["prompt_tokens_vault"] == BLOCKS * BLOCK_TOKENS
        assert split.decode.ask("reset", host=True)
        split.begin(step_s=chunk_s)
        head, answer = split.head(), split.answer()
    finally:
        split.decode.ask("slow_vault", block_s=0.0)
    assert answer["sources"] == from_both(HEAD, BLOCKS - HEAD)
    assert min(fetched["at_s"][0], 2 * head["first_s"]) >= chunk_s * chunks
    assert answer["first_s"] <= 0.75 * fetched["at_s"][0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefill_replica_lost_midway_costs_no_token_of_the_tail(
    split: Split, prefills: Prefill, number: signal.Signals
) -> None:
    """The vault brings what the head lacks, as soon as the peer is known to be lost."""
    split.begin(step_s=0.4)
    split.await_some_of_the_head()
    lost_s = time.monotonic()
    prefills.send(number)
    try:
        answer = split.answer()
        assert time.monotonic() - lost_s <= ANSWER_S + SLACK_S
    finally:
        prefills.engine.kill()
    came = answer["sources"]["peer"] // BLOCK_TOKENS
    assert CHUNK_BLOCKS <= came < HEAD
    assert answer["sources"] == from_both(came, BLOCKS - came)


def test_a_late_head_is_taken_from_the_vault(split: Split) -> None:
    """From its deadline on, though its replica is alive."""
    split.begin(step_s=1.0, head_deadline_s=0.5)
    answer = split.answer()
    assert answer["sources"] == from_both(0, BLOCKS)
    assert 0.5 <= answer["first_s"] <= 0.5 + SLACK_S
    split.prefill.ask("abort", work=split.name)


def test_a_head_that_will_never_come_is_not_waited_for(split: Split) -> None:
    """Its request was stopped, long before the deadline."""
    split.begin(step_s=0.3, head_deadline_s=20.0)
    split.await_some_of_the_head()
    split.prefill.ask("abort", work=split.name)
    answer = split.answer()
    assert answer["first_s"] <= 5.0
    came = answer["sources"]["peer"] // BLOCK_TOKENS
    assert CHUNK_BLOCKS <= came < HEAD
    assert answer["sources"] == from_both(came, BLOCKS - came)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_vault_that_is_lost_costs_the_tail_alone(
    split: Split, vault: ShardHandle, number: signal.Signals
) -> None:
    """The head comes from the peer; what lies behind it is computed."""
    vault.send(number)
    split.begin(step_s=0.1)
    head, answer = split.head(), split.answer()
    assert answer["sources"] == from_both(HEAD, 0, (BLOCKS - HEAD) * BLOCK_TOKENS + 5)
    assert answer["first_s"] <= head["first_s"] + 2.0 + SLACK_S


def test_without_either_the_decode_replica_computes(
    split: Split, vault: ShardHandle, prefills: Prefill
) -> None:
    """All of it, after bounded time."""
    vault.send(signal.SIGKILL)
    split.begin(step_s=2.0)
    prefills.send(signal.SIGKILL)
    answer = split.answer()
    assert answer["sources"] == {"computed": BLOCKS * BLOCK_TOKENS + 5}
    assert answer["first_s"] <= ANSWER_S + 2.0 + SLACK_S
