"""What is remembered of blocks that are not stored: how often they were used, and how deep.

A block that was evicted, or refused, and is put again has shown that it is asked for: without this
memory each return would look like a first visit.
"""

# Blocks remembered for each one that the tenant has, and at least how many for a tenant.
SHARE = 4
FLOOR = 1024


class Past:
    """Hits and generations by tenant and key; the oldest are lost first."""

    def __init__(self) -> None:
        self._known: dict[str, dict[bytes, tuple[int, int]]] = {}

    def remember(
        self, tenant: str, key: bytes, hits: int, generation: int, stored_blocks: int
    ) -> None:
        """Keep this of a block that goes, or did not come, while the tenant has so many others."""
        known = self._known.setdefault(tenant, {})
        known[key] = (hits, generation)
        # Two at most, so that one that has shrunk is brought down step by step.
        for _ in range(2):
            if len(known) > max(FLOOR, SHARE * stored_blocks):
                del known[next(iter(known))]

    def recall(self, tenant: str, key: bytes) -> tuple[int, int] | None:
        """Hits and generation of a block that comes back; they are no longer kept here."""
        return self._known.get(tenant, {}).pop(key, None)

    def forget(self, tenant: str) -> None:
        """Nothing of this tenant is known any more."""
        self._known.pop(tenant, None)
