"""Which replicas may read each other's host tiers: CurveZMQ as on the direct channel, with a secret
of its own, so that an ingress's keys open no host tier and a peer's open no channel.
"""

import hashlib
import hmac

import msgspec

from workers import curve

_LABEL = b"breakeven peer\x01"


class PeerKeys(msgspec.Struct, frozen=True):
    """What a replica holds: it lends as a server, and fetches as a client."""

    server: curve.ServerKeys
    client: curve.ClientKeys

    def __repr__(self) -> str:
        return "PeerKeys(...)"


def peer_keys(secret: bytes) -> PeerKeys:
    """A replica's keys in the cluster of this 32-byte secret (HKDF-Expand, RFC 5869, one block)."""
    own = hmac.new(secret, _LABEL, hashlib.sha256).digest()
    return PeerKeys(curve.server_keys(own), curve.client_keys(own))
