"""What one replica knows to be in a vault, for the catalogue.

A vault evicts without telling, and others store there too: what is known is what this replica has
stored or asked about, and holds until it asks again. A plan that goes by it and is wrong costs a
question, and the blocks are computed.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable

# Of these the oldest are forgotten: a replica stores without end, and each takes some 200 bytes.
MOST = 65_536


class Known:
    """Keys with the tag of their tenant, and what has changed since it was last told."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._tags: OrderedDict[bytes, str] = OrderedDict()
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._tags)

    def add(self, keys: Iterable[bytes], tag: str) -> None:
        """These are there."""
        for key in keys:
            if key in self._removed:  # nobody has heard that it was gone
                del self._removed[key]
            elif key not in self._tags:
                self._stored[key] = None
            self._tags[key] = tag
            self._tags.move_to_end(key)
        while len(self._tags) > self._most:
            self._drop(next(iter(self._tags)))

    def drop(self, keys: Iterable[bytes]) -> None:
        """These are not; unknown ones are ignored."""
        for key in keys:
            if key in self._tags:
                self._drop(key)

    def forget(self, tags: Collection[str]) -> None:
        """Those of these tenants are being erased."""
        self.drop([key for key, tag in self._tags.items() if tag in tags])

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """What came and what went since the last call; no key is in both."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored, self._removed = {}, {}
        return stored, removed

    def _drop(self, key: bytes) -> None:
        del self._tags[key]
        if key in self._stored:
            del self._stored[key]
        else:
            self._removed[key] = None
