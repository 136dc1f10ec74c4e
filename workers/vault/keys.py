"""Who may speak to a vault: CurveZMQ as on the direct channel, with a secret of the vault's own.

The vault's secret derives from the cluster's under a label, so that an ingress's keys open no vault
and a process that is given the vault's secret alone can derive nothing else.
"""

import hashlib
import hmac

from workers import curve

_LABEL = b"breakeven vault\x01"


def vault_secret(secret: bytes) -> bytes:
    """32 bytes by HKDF-Expand (RFC 5869, one block), of the cluster's 32-byte secret."""
    return hmac.new(secret, _LABEL, hashlib.sha256).digest()


def shard_keys(secret: bytes) -> curve.ServerKeys:
    """A shard's keys in the cluster of this secret."""
    return curve.server_keys(vault_secret(secret))


def client_keys(secret: bytes) -> curve.ClientKeys:
    """The keys of a vault's client in the cluster of this secret."""
    return curve.client_keys(vault_secret(secret))
