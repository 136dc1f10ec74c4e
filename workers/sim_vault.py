"""A vault without an end, of all simulated engines of a cluster."""

from collections.abc import Sequence

from kv.catalogue import Tier
from workers.mirror import Change


class SimVault:
    """Blocks, each with its tag; `shelf` is what one engine knows of them."""

    def __init__(self) -> None:
        self._tags: dict[bytes, str] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._tags

    def put(self, keys: Sequence[bytes], tag: str) -> None:
        """Blocks of one tag."""
        self._tags.update(dict.fromkeys(keys, tag))

    def erase(self, tags: Sequence[str]) -> None:
        """Forget the blocks of these tags."""
        self._tags = {key: tag for key, tag in self._tags.items() if tag not in tags}


class Shelf:
    """One engine's side of the vault: what it stored there, and found, it tells."""

    def __init__(self, vault: SimVault) -> None:
        self.vault = vault
        self._tags: dict[bytes, str] = {}
        self._stored: list[bytes] = []
        self._removed: list[bytes] = []

    def __len__(self) -> int:
        return len(self._tags)

    def put(self, keys: Sequence[bytes], tag: str) -> None:
        """Blocks that are in the vault from now on."""
        self.vault.put(keys, tag)
        self._stored += [key for key in keys if key not in self._tags]
        self._tags.update(dict.fromkeys(keys, tag))

    def erase(self, tags: Sequence[str]) -> None:
        """Erase them for everybody."""
        self.vault.erase(tags)
        erased = {key for key, tag in self._tags.items() if tag in tags}
        self._removed += [key for key in erased if key not in self._stored]
        self._stored = [key for key in self._stored if key not in erased]
        self._tags = {key: tag for key, tag in self._tags.items() if tag not in tags}

    def take(self) -> Change:
        """The net change since the last call."""
        # What was erased and stored anew is told as it was.
        removed = [key for key in self._removed if key not in self._tags]
        stored = [key for key in self._stored if key not in self._removed]
        self._stored, self._removed = [], []
        return Change(b"".join(stored), b"".join(removed), Tier.VAULT)

    def snapshot(self) -> bytes:
        """Every block, concatenated."""
        return b"".join(self._tags)
