"""By what names the audit calls tenants, sessions and blocks.

Keyed by the cluster's secret, which is drawn at each `serve` and never written down: whoever reads
an audit sees who is the same as whom within that one run, and can confirm no guess. All ingresses
of a run use the same names, so that their files can be read together.
"""

import hashlib
import hmac
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kv.audit import NAME_BYTES
from kv.block import KEY_BYTES

_DIGITS = 16


class Pseudonyms:
    """The names of one run of a cluster, whose `capture` names the run itself."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.capture = self._digest(b"capture", b"")
        key = hmac.new(secret, b"audit blocks\0", hashlib.sha256).digest()
        # A keyed permutation of 16 bytes is all that is wanted of it: keys are that long, and
        # differ. One call names a whole prompt; 128 blocks take some microseconds.
        self._blocks = Cipher(algorithms.AES(key), modes.ECB())

    def tenant(self, name: str) -> str:
        """A tenant's, 16 hex digits."""
        return self._digest(b"tenant", name.encode("utf-8", "surrogatepass"))

    def session(self, key: bytes | None) -> str | None:
        """That of a session's key (`router.policy.session.affinity`)."""
        return None if key is None else self._digest(b"session", key)

    def blocks(self, keys: Sequence[bytes]) -> bytes:
        """Those of blocks, 8 bytes each, in the order of their 16-byte keys."""
        hidden = self._blocks.encryptor().update(b"".join(keys))
        starts = range(0, len(hidden), KEY_BYTES)
        return b"".join(hidden[at : at + NAME_BYTES] for at in starts)

    def _digest(self, what: bytes, message: bytes) -> str:
        labelled = b"audit " + what + b"\0" + message
        return hmac.new(self._secret, labelled, hashlib.sha256).hexdigest()[:_DIGITS]
