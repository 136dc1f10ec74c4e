"""The form of a salt: a tag that says whose blocks it names, and a digest that names them.

The router makes salts (`router.salt`); a worker reads no more than the tag, which is opaque to it.
A tag lets a worker find all blocks of one tenant without knowing the tenant or its prompts.
"""

import hashlib

# The tag of requests without a salt of ours: the namespace that everybody shares.
UNTAGGED = ""
_MARK = "."


def tagged(tag: str, digest: str) -> str:
    """A salt whose blocks can be found again by `tag`, which holds no full stop."""
    return f"{tag}{_MARK}{digest}"


def tag_of(salt: str | None) -> str:
    """The tag of a salt; UNTAGGED for None and for a salt that was not made by `tagged`."""
    tag, mark, _ = (salt or "").partition(_MARK)
    return tag if mark else UNTAGGED


def lossy(salt: str | None, codec: str, gate_id: str) -> str:
    """The salt of a request that opted into a lossy codec, from the salt that it has otherwise.

    A namespace of its own for each codec and gate (`kv.codecs.gate.gate_id`): neither a lossy block
    nor one computed behind it is ever found under a lossless name. The tag stays, so that a tenant
    can still be erased.
    """
    message = b"lossy\0" + _field(codec) + _field(gate_id)
    # No salt and an empty salt are different namespaces.
    message += b"" if salt is None else _field(salt)
    return tagged(tag_of(salt), hashlib.sha256(message).hexdigest())


def _field(text: str) -> bytes:
    # Salts come from JSON, which can carry lone surrogates.
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(4, "big") + encoded
