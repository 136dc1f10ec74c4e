"""The form of a salt: a tag that says whose blocks it names, and a digest that names them.

The router makes salts (`router.salt`); a worker reads no more than the tag, which is opaque to it.
A tag lets a worker find all blocks of one tenant without knowing the tenant or its prompts.
"""

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
