"""The salt under which a tenant's blocks are named, and the tag by which they are found again."""

import hashlib
import hmac
from collections.abc import Mapping

from kv.codecs.codec import CodecName
from kv.salt import UNTAGGED, lossy, tagged
from router.context import DEFAULT_TENANT

_TAG_DIGITS = 16


def tenant_tag(secret: bytes, tenant: str) -> str:
    """64 bits of an HMAC-SHA256 over the tenant's name, as hex: workers learn no names."""
    message = b"tenant tag\0" + tenant.encode("utf-8", "surrogatepass")
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:_TAG_DIGITS]


def tenant_salt(secret: bytes, tenant: str, client_salt: str) -> str:
    """The tenant's tag, then an HMAC-SHA256 over the tenant and the client's own salt, as hex.

    Two tenants never share a block by choosing the same salt, and nobody can guess another's.
    """
    message = (
        len(tenant.encode()).to_bytes(4, "big")
        + tenant.encode()
        + client_salt.encode("utf-8", "surrogatepass")
    )
    digest = hmac.new(secret, message, hashlib.sha256).hexdigest()
    return tagged(tenant_tag(secret, tenant), digest)


class Salter:
    """Names a request's blocks after its tenant. `separate` is set once there are keys: then a
    request without a salt of its own is in its tenant's namespace too. `gates` are the lossy codecs
    that the model may use, each with the id of the gate that it passed (`kv.codecs.gate`)."""

    def __init__(
        self, secret: bytes, separate: bool, gates: Mapping[CodecName, str] | None = None
    ) -> None:
        self._secret, self._separate, self._gates = secret, separate, dict(gates or {})

    def salt(
        self, tenant: str, client_salt: str | None, codec: CodecName | None = None
    ) -> str | None:
        """The salt of every block of a request; None for the one shared namespace.

        With a codec of `gates` it names that codec's namespace, with any other the exact one.
        """
        exact: str | None = None
        if client_salt is not None or self._separate:
            exact = tenant_salt(self._secret, tenant, client_salt or "")
        gate = self.gate(codec)
        return exact if codec is None or gate is None else lossy(exact, codec, gate)

    def gate(self, codec: CodecName | None) -> str | None:
        """The id of the gate that a codec passed; None for one that is not to be used."""
        return None if codec is None else self._gates.get(codec)

    def tags(self, tenant: str) -> tuple[str, ...]:
        """What marks all blocks of a tenant. Without keys everybody is the default tenant, and
        blocks without a salt are among its own."""
        own = tenant_tag(self._secret, tenant)
        shared = tenant == DEFAULT_TENANT and not self._separate
        return (own, UNTAGGED) if shared else (own,)
