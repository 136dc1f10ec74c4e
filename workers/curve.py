"""Who may speak on the direct channel: CurveZMQ, with keys that only this cluster has.

Both key pairs derive from the cluster's secret, so nothing is written down or handed around. CURVE
(RFC 26) encrypts and authenticates each message with fresh keys for each connection; a replica
also asks who connects (ZAP, RFC 27), and takes the cluster's own ingresses only.
"""

import hashlib
import hmac
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils import z85

_ZAP = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
# Not empty: libzmq refuses everybody while a domain is enforced and nobody answers for it.
_DOMAIN = b"breakeven"


class ServerKeys(msgspec.Struct, frozen=True):
    """What a replica holds: its own pair, and whom it takes. Z85, 40 characters each."""

    secret: bytes
    client: bytes

    def __repr__(self) -> str:
        return "ServerKeys(...)"


class ClientKeys(msgspec.Struct, frozen=True):
    """What an ingress holds: its own pair, and whom it talks to. Z85, 40 characters each."""

    secret: bytes
    public: bytes
    server: bytes

    def __repr__(self) -> str:
        return "ClientKeys(...)"


def server_keys(secret: bytes) -> ServerKeys:
    """A replica's keys in the cluster of this 32-byte secret."""
    return ServerKeys(_key(secret, b"server"), zmq.curve_public(_key(secret, b"client")))


def client_keys(secret: bytes) -> ClientKeys:
    """An ingress's keys in the cluster of this 32-byte secret."""
    own, server = _key(secret, b"client"), _key(secret, b"server")
    return ClientKeys(own, zmq.curve_public(own), zmq.curve_public(server))


def lock(server: zmq.Socket[Any], keys: ServerKeys) -> None:
    """Have a socket, not yet bound, take nobody whom `admit` does not let in."""
    server.setsockopt(zmq.CURVE_SERVER, 1)
    server.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    server.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    server.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def bind(server: zmq.Socket[Any], host: str) -> str:
    """Have a locked socket listen there; the address for those who connect. The port is the
    kernel's choice, so that an operator's `net.ipv4.ip_local_port_range` bounds it."""
    server.bind(f"tcp://{host}:0")
    address = server.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.rstrip(b"\0").decode()


def unlock(client: zmq.Socket[Any], keys: ClientKeys) -> None:
    """Have a socket, not yet connected, speak to this cluster's replicas and nobody else."""
    client.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    client.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    client.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)


async def admit(context: zmq.asyncio.Context, keys: ServerKeys) -> None:
    """Until cancelled: let in who proves to hold the client's key. While this does not run
    nobody is let in; connections that stand are not asked again."""
    with context.socket(zmq.REP) as asked:
        asked.bind(_ZAP)
        while True:
            _, request_id, _, _, _, mechanism, *proof = await asked.recv_multipart()
            known = mechanism == b"CURVE" and proof == [z85.decode(keys.client)]
            verdict = [b"200", b"OK"] if known else [b"400", b"not of this cluster"]
            await asked.send_multipart([_VERSION, request_id, *verdict, b"", b""])


def _key(secret: bytes, whose: bytes) -> bytes:
    """A Curve25519 secret key by HKDF-Expand (RFC 5869, one block), in Z85."""
    label = b"breakeven channel " + whose
    return z85.encode(hmac.new(secret, label + b"\x01", hashlib.sha256).digest())
