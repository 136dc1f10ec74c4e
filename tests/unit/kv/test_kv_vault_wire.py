"""What a vault's clients and shards say to each other."""

import pickle
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.errors import VaultMessageError
from kv.vault import wire
from kv.vault.arena import Extent
from kv.vault.orders import Outcome

KEY = b"k" * 32
OFFER = wire.Offer(KEY, None, 4096, 0.5, 3600.0)
QUESTIONS: list[wire.Question] = [
    wire.Hello(1, "engine-0", "f" * 24),
    wire.Put(1, "tag", "raw", (OFFER, wire.Offer(b"other", KEY, 64, 0.0))),
    wire.Written(1, (0, None, (1 << 64) - 1)),
    wire.Get(2, (KEY, b"other")),
    wire.Has(5, (KEY, b"other")),
    wire.Done(2, (0, 1)),
    wire.Forget(3, ("tag",)),
    wire.Stat(4),
]
REPLIES: list[wire.Reply] = [
    wire.Welcome("vault-0", b"\0metadata", 1 << 47, 1 << 30),
    wire.Denied("another version"),
    wire.Granted(1, (wire.Verdict(Outcome.WRITE, "", (Extent(0, 9), Extent(64, 3))),), 30.0),
    wire.Stored(1, (wire.Verdict(Outcome.REFUSED, wire.Reason.LATE),)),
    wire.Lent(2, (wire.Place((Extent(4096, 64),), (1 << 64) - 1),), 10.0),
    wire.Held(5, (True, False)),
    wire.Forgotten(3, 5, 0, True),
    wire.Stats(4, 1, 2, 3, 4, 5, {"raw": 6}),
    wire.Beat(),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: type(q).__name__)
def test_a_question_arrives_as_it_was_sent(question: wire.Question) -> None:
    """Each of them, and it is no reply."""
    assert wire.decode_question(wire.encode(question), "peer") == question
    with pytest.raises(VaultMessageError):
        wire.decode_reply(wire.encode(question), "peer")


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: type(r).__name__)
def test_a_reply_arrives_as_it_was_sent(reply: wire.Reply) -> None:
    """Each of them, and it is no question."""
    assert wire.decode_reply(wire.encode(reply), "peer") == reply
    with pytest.raises(VaultMessageError):
        wire.decode_question(wire.encode(reply), "peer")


@given(st.binary(max_size=200))
def test_noise_is_refused(frame: bytes) -> None:
    """Bytes that are no message raise the one error that servers expect."""
    for decode in (wire.decode_question, wire.decode_reply):
        with suppress(VaultMessageError):
            assert isinstance(decode(frame, "peer"), msgspec.Struct)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "shutdown"},
        {"number": -1},
        {"surplus": 1},
        {"keys": []},
        {"keys": [b""]},
        {"keys": [b"k" * 65]},
        {"keys": [KEY] * (wire.MOST_BLOCKS + 1)},
    ],
    ids=str,
)
def test_a_get_outside_its_bounds_is_refused(change: dict[str, object]) -> None:
    """Unknown messages, unknown fields, and amounts that no client asks for."""
    told = {"type": "get", "number": 1, "keys": [KEY], **change}
    with pytest.raises(VaultMessageError):
        wire.decode_question(msgspec.msgpack.encode(told), "peer")


@pytest.mark.parametrize(
    "offer",
    [
        [KEY, None, 10, 0.5, None],
        [KEY, None, 1 << 41, 0.5, None],
        [KEY, None, 4096, -1.0, None],
        [KEY, None, 4096, float("inf"), None],
        [KEY, None, 4096, float("nan"), None],
        [KEY, None, 4096, 0.5, 0.0],
        [KEY, None, 4096, 0.5, float("inf")],
        [KEY, None, 4096, 0.5, None, "surplus"],
    ],
    ids=str,
)
def test_an_offer_of_no_block_is_refused(offer: list[object]) -> None:
    """Sizes, costs and lives that would upset the books."""
    told = {"type": "put", "number": 1, "tenant": "t", "codec": "raw", "offers": [offer]}
    with pytest.raises(VaultMessageError):
        wire.decode_question(msgspec.msgpack.encode(told), "peer")


def test_a_hello_of_another_version_can_still_be_read() -> None:
    """Else it could not be told why it is refused."""
    told = {"type": "hello", "version": 9, "client": "c", "fingerprint": "f", "new": [1, 2]}
    hello = wire.decode_question(msgspec.msgpack.encode(told), "peer")
    assert isinstance(hello, wire.Hello)
    assert hello.version == 9


def test_a_pickle_is_never_loaded() -> None:
    """Loading one would run what its sender likes."""

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("unpickled",))

    for decode in (wire.decode_question, wire.decode_reply):
        with pytest.raises(VaultMessageError):
            decode(pickle.dumps(Bomb()), "peer")
