"""What peers say to each other, and whose keys open a host tier."""

from contextlib import suppress

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from workers import curve
from workers.errors import WireError
from workers.peer import wire
from workers.peer.keys import peer_keys
from workers.vault import keys as vault_keys

SECRET = bytes(range(32))
QUESTIONS: list[wire.Question] = [
    wire.Hello(1, "f" * 24),
    wire.Find(2, (b"k" * 36, b"")),
    wire.Find(2, (b"k" * 36,), "request.0"),
    wire.Get(3, (b"k" * 36,), 1.5),
    wire.Done(3),
]
REPLIES: list[wire.Reply] = [
    wire.Welcome(b"\0metadata", 1 << 47, 4096, 256),
    wire.Denied("another version"),
    wire.Found(2, (True, False)),
    wire.Found(2, (True, False), ended=True),
    wire.Lent(3, (wire.Place(7, (1 << 64) - 1), None)),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: type(q).__name__)
def test_a_question_arrives_as_it_was_sent(question: wire.Question) -> None:
    """Each of them, and it is no reply."""
    assert wire.decode_question(wire.encode(question), "peer") == question
    with pytest.raises(WireError):
        wire.decode_reply(wire.encode(question), "peer")


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: type(r).__name__)
def test_a_reply_arrives_as_it_was_sent(reply: wire.Reply) -> None:
    """Each of them, and it is no question."""
    assert wire.decode_reply(wire.encode(reply), "peer") == reply
    with pytest.raises(WireError):
        wire.decode_question(wire.encode(reply), "peer")


@given(st.binary(max_size=200))
def test_noise_is_refused(frame: bytes) -> None:
    """Bytes that are no message raise the one error that both ends expect."""
    for decode in (wire.decode_question, wire.decode_reply):
        with suppress(WireError):
            assert isinstance(decode(frame, "peer"), msgspec.Struct)


def test_a_whole_question_fits_a_message() -> None:
    """As many keys as a question may have, each with its group."""
    keys = tuple([b"k" * 36] * wire.MOST_KEYS)
    places = tuple([wire.Place(1 << 30, (1 << 64) - 1)] * wire.MOST_KEYS)
    for message in (wire.Get(1 << 40, keys, 30.0), wire.Lent(1 << 40, places)):
        assert len(wire.encode(message)) < wire.MOST_MESSAGE_BYTES


def test_replicas_of_a_cluster_open_each_other() -> None:
    """Each holds the public half of the other's pair."""
    ours = peer_keys(SECRET)
    assert ours.server.client == ours.client.public
    assert ours.client.server == zmq.curve_public(ours.server.secret)


def test_peers_keys_are_nobody_elses() -> None:
    """Neither an ingress, nor a vault's client, nor a replica of another cluster is let in."""
    publics = [
        peer_keys(SECRET).client.public,
        peer_keys(bytes(32)).client.public,
        curve.client_keys(SECRET).public,
        vault_keys.client_keys(SECRET).public,
    ]
    assert len(set(publics)) == len(publics)
    assert repr(peer_keys(SECRET)) == "PeerKeys(...)"
