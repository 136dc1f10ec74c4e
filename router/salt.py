"""The salt under which a tenant's blocks are named."""

import hashlib
import hmac


def tenant_salt(secret: bytes, tenant: str, client_salt: str) -> str:
    """HMAC-SHA256 over the tenant and the client's own salt, as hex.

    Two tenants never share a block by choosing the same salt, and nobody can guess another's.
    """
    message = (
        len(tenant.encode()).to_bytes(4, "big")
        + tenant.encode()
        + client_salt.encode("utf-8", "surrogatepass")
    )
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


class Salter:
    """Names a request's blocks after its tenant. `separate` is set once there are keys: then a
    request without a salt of its own is in its tenant's namespace too."""

    def __init__(self, secret: bytes, separate: bool) -> None:
        self._secret, self._separate = secret, separate

    def salt(self, tenant: str, client_salt: str | None) -> str | None:
        """The salt of every block of a request; None for the one shared namespace."""
        if client_salt is None and not self._separate:
            return None
        return tenant_salt(self._secret, tenant, client_salt or "")
