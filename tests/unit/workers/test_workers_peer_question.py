"""Blocks that a peer has, will have, or never will."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from workers.errors import PeerLostError
from workers.peer import question as questions
from workers.peer import wire
from workers.peer.question import Finding, Question


class Peer:
    """Both the line to it and the session: what it has, and whether its work has ended."""

    address = "tcp://p"
    resting = False

    def __init__(self, *here: bytes, ended: bool = False) -> None:
        self.here, self.ended = set(here), ended
        self.asked: list[wire.Find] = []
        self.complaints: list[str] = []
        self.answers_less = 0
        self.left_s: list[float] = []

    def rest(self, complaint: str) -> None:
        self.complaints.append(complaint)

    def number(self) -> int:
        return len(self.asked)

    def tell(self, find: wire.Find) -> None:
        self.asked.append(find)

    def answer(self, kind: type[wire.Found], number: int, deadline_s: float) -> wire.Found:
        self.left_s.append(deadline_s - time.monotonic())
        find = self.asked[number]
        keys = find.keys[: len(find.keys) - self.answers_less]
        return wire.Found(number, tuple(key in self.here for key in keys), self.ended)


def asking(peer: Any, timeout_s: float = 5.0, answer_s: float = 1.0, work: str = "r.0") -> Question:
    return Question(peer, timeout_s, answer_s, work)


def look(question: Question, peer: Any, *keys: bytes) -> list[bool | None]:
    """As a step of the engine does: first what is known, then what is to be asked is."""
    found = [question.look(key) for key in keys]
    if question.unsent:
        keys_to_ask, question.unsent = question.unsent, []
        Finding(question, keys_to_ask).run(peer)
    return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "ASK_AGAIN_S", 0.0)


def test_blocks_on_their_way_are_asked_for_until_they_are_there() -> None:
    """In order, under the name of what computes them; what has come is not asked for again."""
    peer = Peer(b"a")
    question = asking(peer)
    assert look(question, peer, b"a", b"b", b"c") == [None, None, None]
    assert look(question, peer, b"a", b"b", b"c") == [True, None, None]
    peer.here.add(b"b")
    look(question, peer, b"a", b"b", b"c")
    assert look(question, peer, b"a", b"b", b"c") == [True, True, None]
    asked = [(b"a", b"b", b"c"), (b"b", b"c"), (b"b", b"c"), (b"c",)]
    assert [find.keys for find in peer.asked] == asked
    assert {find.work for find in peer.asked} == {"r.0"}


def test_a_question_that_ends_is_no_failure_of_a_peer_that_answers() -> None:
    """What is under way as a head's time ends has as long as any exchange; where nothing is
    computed for it, the question's own time is what a peer has."""
    for work, least_s, most_s in (("r.0", 0.9, 1.0), ("", 0.0, 0.05)):
        peer = Peer(b"a")
        look(asking(peer, timeout_s=0.05, answer_s=1.0, work=work), peer, b"a")
        [left_s] = peer.left_s
        assert least_s < left_s <= most_s


def test_what_is_not_there_at_the_end_never_comes() -> None:
    """The request that was to compute it has ended: it failed, or its copy is gone."""
    peer = Peer(b"a", ended=True)
    question = asking(peer)
    look(question, peer, b"a", b"b")
    assert look(question, peer, b"a", b"b") == [True, False]
    assert len(peer.asked) == 1
    assert not question.failed


def test_what_nobody_computes_is_asked_for_once() -> None:
    """A block that a peer does not have is a miss, as it was."""
    peer = Peer(b"a")
    question = asking(peer, work="")
    look(question, peer, b"a", b"b")
    assert look(question, peer, b"a", b"b") == [True, False]
    assert len(peer.asked) == 1


def test_a_question_is_not_asked_again_while_it_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor before its time: the engine looks a thousand times a second."""
    peer = Peer()
    question = asking(peer)
    for _ in range(3):
        question.look(b"a")
    assert question.unsent == [b"a"]
    question.unsent = []
    question.look(b"a")
    assert question.unsent == []
    monkeypatch.setattr(questions, "ASK_AGAIN_S", 0.03)
    Finding(question, [b"a"]).run(peer)  # type: ignore[arg-type]
    assert question.look(b"a") is None
    assert question.unsent == []
    time.sleep(0.04)
    question.look(b"a")
    assert question.unsent == [b"a"]


def test_a_long_head_is_asked_for_as_far_as_it_may_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the first that is not there none is, until the end."""
    monkeypatch.setattr(questions, "_AHEAD_KEYS", 2)
    keys = [b"%d" % number for number in range(7)]
    peer = Peer(*keys[:3])
    question = asking(peer)
    look(question, peer, *keys)
    assert [find.keys for find in peer.asked] == [(b"0", b"1"), (b"2", b"3")]
    peer.ended = True
    look(question, peer, *keys)
    assert look(question, peer, *keys) == [True] * 3 + [False] * 4


def test_a_head_that_is_late_is_no_fault_of_the_peers() -> None:
    """It answers; other requests may go on asking it. One that was asked for what it has, and did
    not answer, rests."""
    peer = Peer()
    late = asking(peer, timeout_s=0.0)
    late.look(b"a")  # its time runs from here
    assert late.look(b"a") is False
    assert late.failed
    assert peer.complaints == []
    silent = asking(peer, timeout_s=0.0, work="")
    silent.look(b"a")
    assert silent.look(b"a") is False
    assert peer.complaints == ["no answer in time"]


def test_each_exchange_has_its_own_time_within_the_questions() -> None:
    """So that a peer which stops in the middle of a long head is noticed soon."""
    question = asking(Peer(), timeout_s=60.0, answer_s=1.0)
    now_s = time.monotonic()
    assert now_s + 0.9 <= question.deadline_s <= now_s + 1.5
    time.sleep(0.02)
    assert question.deadline_s > now_s + 1.01
    assert asking(Peer(), timeout_s=0.5, answer_s=1.0).deadline_s <= time.monotonic() + 0.5


def test_a_peer_that_answers_for_fewer_blocks_is_lost() -> None:
    """Whatever it means, nothing is taken for an answer."""
    peer = Peer(b"a", b"b")
    peer.answers_less = 1
    with pytest.raises(PeerLostError, match="1 answers for 2 blocks"):
        Finding(asking(peer), [b"a", b"b"]).run(peer)  # type: ignore[arg-type]


def test_a_question_of_a_resting_peer_fails() -> None:
    """At once, and its jobs are over."""
    peer = SimpleNamespace(resting=True, address="tcp://p")
    question = asking(peer)
    assert question.look(b"a") is False
    assert Finding(question, [b"a"]).over()
