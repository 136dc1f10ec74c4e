"""Which requests a mixed load sends, and when: agents, documents and chats, from a seed.

An agent's turn resends all that was said and adds to it; all agents share a system prompt. A
document is long and asked about several times. A chat is short and nobody shares it. Arrivals
are a Poisson process of which the number is given, so that the offered rate is exact: times that
are uniform over the window. It is an open loop: a turn comes at its time whether the one before it
is answered or not, so what agents are said to have answered is made up beforehand.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

# Ids that are ordinary text in SmolLM2's vocabulary of 49,152.
IDS = range(1000, 40_000)


class Kind(StrEnum):
    """What a request is part of."""

    AGENT = "agent"
    DOCUMENT = "document"
    CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of prompts; two with one number are the same text."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as the pieces that follow each other in it, and when it is sent, in seconds."""

    at_s: float
    kind: Kind
    pieces: tuple[Piece, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of arrivals; tokens of prompts, as least and most where they vary; agents that talk
    at once, documents that are asked about at once, and how often each is."""

    agents: float = 0.4
    documents: float = 0.2
    chat_tokens: tuple[int, int] = (64, 192)
    system_tokens: int = 512
    turn_tokens: tuple[int, int] = (96, 288)
    talk_tokens: int = 2048
    talks: int = 4
    document_tokens: tuple[int, int] = (1408, 2048)
    question_tokens: int = 32
    open_documents: int = 3
    asks: int = 3

    def shares(self) -> dict[Kind, float]:
        """Of all arrivals."""
        chats = 1.0 - self.agents - self.documents
        return {Kind.AGENT: self.agents, Kind.DOCUMENT: self.documents, Kind.CHAT: chats}


@dataclass(slots=True)
class _Writer:
    """Draws the prompts of one schedule."""

    mix: Mix
    rng: random.Random
    numbers: int = 0
    talks: list[tuple[Piece, ...]] = field(default_factory=list)
    documents: list[tuple[Piece, int]] = field(default_factory=list)
    system: Piece = field(init=False)

    def __post_init__(self) -> None:
        self.system = self._piece((self.mix.system_tokens,) * 2)

    def write(self, kind: Kind) -> tuple[Piece, ...]:
        """The next prompt of this kind."""
        if kind is Kind.CHAT:
            return (self._piece(self.mix.chat_tokens),)
        return self._turn() if kind is Kind.AGENT else self._question()

    def _turn(self) -> tuple[Piece, ...]:
        if len(self.talks) < self.mix.talks:
            self.talks.append((self.system,))
        at = self.rng.randrange(len(self.talks))
        turn = (*self.talks[at], self._piece(self.mix.turn_tokens))
        if sum(piece.tokens for piece in turn) > self.mix.talk_tokens:
            turn = (self.system, self._piece(self.mix.turn_tokens))
        self.talks[at] = turn
        return turn

    def _question(self) -> tuple[Piece, ...]:
        if len(self.documents) < self.mix.open_documents:
            self.documents.append((self._piece(self.mix.document_tokens), self.mix.asks))
        at = self.rng.randrange(len(self.documents))
        document, left = self.documents.pop(at)
        if left > 1:
            self.documents.append((document, left - 1))
        return document, self._piece((self.mix.question_tokens,) * 2)

    def _piece(self, least_most: tuple[int, int]) -> Piece:
        self.numbers += 1
        return Piece(self.numbers, self.rng.randint(*least_most))


def schedule(mix: Mix, per_s: float, seconds: float, seed: int) -> list[Request]:
    """The requests of a window in which `per_s` arrive each second; at least one."""
    count = max(1, round(per_s * seconds))
    rng = random.Random(seed)
    writer, shares = _Writer(mix, rng), mix.shares()
    kinds = rng.choices(list(shares), list(shares.values()), k=count)
    times_s = sorted(rng.uniform(0.0, seconds) for _ in kinds)
    pairs = zip(times_s, kinds, strict=True)
    return [Request(at_s, kind, writer.write(kind)) for at_s, kind in pairs]


def tokens(pieces: Sequence[Piece], text: str) -> list[int]:
    """The prompt's token ids; another `text` makes the same pieces of other tokens, which no cache
    holds."""
    return [token for piece in pieces for token in _ids(piece, text)]


def _ids(piece: Piece, text: str) -> list[int]:
    return random.Random(f"{text}/{piece.number}").choices(IDS, k=piece.tokens)
