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
