"""Only the cluster's own ingresses are heard, and nothing on the wire can be read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import zmq
import zmq.asyncio
from zmq.utils import z85

from workers import curve, server
from workers.channel import ChannelLink
from workers.curve import ClientKeys, client_keys, server_keys
from workers.messages import Hello, Reply, Role, Welcome, encode
from workers.server import ReplicaServer
from workers.sim import SimCosts, sim_replica

SECRET, OTHER = bytes(range(32)), bytes(32)
OURS, THEIRS = client_keys(SECRET), client_keys(OTHER)
REPLICA = sim_replica("decode-0", Role.DECODE, SimCosts())
# Far more than a handshake over loopback takes.
_PATIENCE_S = 0.5


class Engine:
    """As much as a server asks for when it greets."""

    failure: BaseException | None = None

    def stalled_s(self) -> float:
        return 0.0

    def snapshot(self, receiver: Callable[[bytes], None]) -> None:
        receiver(b"")

    def abort(self, request_ids: list[str]) -> None:
        pass


class Inbox:
    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def receive(self, reply: Reply) -> None:
        self.replies.append(reply)


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ReplicaServer]:
    """A server that must be well at the end: it still welcomes whom it should."""
    monkeypatch.setattr(server, "_BEAT_S", 0.02)
    made = ReplicaServer("127.0.0.1", server_keys(SECRET))
    serving = asyncio.create_task(made.serve(Engine(), REPLICA))  # type: ignore[arg-type]
    try:
        yield made
        assert await welcomed(made.address, OURS)
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def welcomed(address: str, keys: ClientKeys) -> bool:
    """Whether a link with these keys hears anything."""
    inbox = Inbox()
    link = ChannelLink(address, "ingress-0", inbox, keys)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not inbox.replies:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        return False
    finally:
        link.close()
    assert isinstance(inbox.replies[0], Welcome)
    return True


async def test_the_cluster_s_own_ingress_is_welcomed(served: ReplicaServer) -> None:
    """Keys that both ends derive from one secret fit each other."""
    assert await welcomed(served.address, OURS)


@pytest.mark.parametrize(
    "keys",
    [
        THEIRS,
        # Knows the server's public key, which is no secret, and has a key pair of its own.
        msgspec.structs.replace(THEIRS, server=OURS.server),
        # Knows all that is public, and lacks the secret key that goes with it.
        ClientKeys(THEIRS.secret, OURS.public, OURS.server),
        # Has the right pair, and takes somebody else for the server.
        msgspec.structs.replace(OURS, server=THEIRS.server),
    ],
    ids=["another cluster", "own pair", "stolen name", "another server"],
)
async def test_other_keys_get_nothing(served: ReplicaServer, keys: ClientKeys) -> None:
    """Not a word, and the server stays well."""
    assert not await welcomed(served.address, keys)
    assert not served._peers


async def test_a_client_without_a_key_gets_nothing(served: ReplicaServer) -> None:
    """ZMQ without CURVE is refused, and so are bytes that are no ZMQ."""
    with zmq.asyncio.Context.instance().socket(zmq.DEALER) as bare:
        bare.connect(served.address)
        await bare.send(encode(Hello("ingress-0")))
        assert not await bare.poll(int(_PATIENCE_S * 1000))
    host, port = served.address.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
    # Whether it hangs up at once or waits for a greeting that it understands is ZMQ's to choose.
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(5.0):
            while await reader.read(100):
                pass
    writer.close()
    assert not served._peers


async def test_nobody_is_let_in_while_nobody_asks_who_they_are() -> None:
    """A server whose authenticator does not run takes not even its own ingress."""
    made = ReplicaServer("127.0.0.1", server_keys(SECRET))
    link = ChannelLink(made.address, "ingress-0", Inbox(), OURS)
    heard = await made._socket.poll(int(_PATIENCE_S * 1000))
    link.close()
    made._context.destroy(linger=0)
    assert not heard


async def test_an_authenticator_that_ends_ends_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica restarts then, instead of refusing everybody from then on."""

    async def broken(*_: object) -> None:
        raise ValueError("no such mechanism")

    monkeypatch.setattr(curve, "admit", broken)
    made = ReplicaServer("127.0.0.1", server_keys(SECRET))
    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        await made.serve(Engine(), REPLICA)  # type: ignore[arg-type]


async def test_what_crosses_the_wire_cannot_be_read(served: ReplicaServer) -> None:
    """Between the two ends no name and no token is in clear."""
    seen, ended = bytearray(), asyncio.Event()
    host, port = served.address.removeprefix("tcp://").split(":")

    async def pass_on(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                seen.extend(data)
                to.write(data)
        to.close()
        with contextlib.suppress(ConnectionError):
            await to.wait_closed()

    async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(reader, ahead), pass_on(behind, writer))
        ended.set()

    async with await asyncio.start_server(tap, "127.0.0.1", 0) as tapped:
        port_of_tap = tapped.sockets[0].getsockname()[1]
        assert await welcomed(f"tcp://127.0.0.1:{port_of_tap}", OURS)
        await asyncio.wait_for(ended.wait(), 5)
    assert b"CURVE" in seen
    assert b"ingress-0" not in seen
    assert b"decode-0" not in seen


def test_keys_follow_from_the_secret_alone() -> None:
    """The same at both ends and after a restart of one; another cluster's are others; the two
    ends differ, and a replica cannot speak as an ingress."""
    assert server_keys(SECRET) == server_keys(SECRET)
    assert client_keys(SECRET) == client_keys(SECRET)
    assert server_keys(SECRET).secret not in (server_keys(OTHER).secret, OURS.secret)
    assert server_keys(SECRET).client == OURS.public
    assert zmq.curve_public(server_keys(SECRET).secret) == OURS.server
    assert len(z85.decode(OURS.secret)) == 32


def test_secrets_are_not_shown() -> None:
    """Neither in a repr nor in a format string."""
    for keys in (server_keys(SECRET), OURS):
        for shown in (repr(keys), str(keys), f"{keys}", repr([keys])):
            assert keys.secret.decode() not in shown
