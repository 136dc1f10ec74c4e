"""One engine with a vault behind its host tier, in a process of its own.

As `tiered_engine.py`; what a replica is told of its vault comes with the settings.
"""

from pathlib import Path
from typing import Any

from tests.flow.tiered_engine import Bench, TieredEngine, main
from tests.vault.shard_process import SECRET


class VaultEngine(TieredEngine):
    """The process, seen from a test; `addresses` are where the vault's shards are."""

    program = __file__

    def __init__(
        self,
        model: Path,
        folder: Path,
        tiers: dict[str, Any],
        addresses: dict[str, str],
        **more: Any,
    ) -> None:
        super().__init__(model, folder, tiers, addresses=addresses, **more)


class VaultBench(Bench):
    """In the process."""

    def __init__(self, model: str, folder: Path, settings: dict[str, Any]) -> None:
        from kv.curve import PrefillCurve
        from workers.quality import page_shape
        from workers.vault.keys import client_keys

        super().__init__(model, folder, settings)
        assert self.engine.vault is not None
        self._vault = self.engine.vault
        shape = page_shape(self.engine.core)
        self._vault.attach(client_keys(SECRET), PrefillCurve(0.0, 1e-4, 1e-8), shape)
        self.up = self.seat(settings["addresses"], settings.get("up_s", 20.0))

    def seat(self, addresses: dict[str, str], up_s: float = 20.0) -> bool:
        """Tell where the shards are, and whether they answer within a time."""
        self._vault.seat(addresses)
        return self._vault.await_up(up_s)

    def books(self) -> dict[str, int]:
        """What the tier still has under way, once nothing is."""
        tier = self._vault
        pinned = self._between_steps(self._pinned)
        return {"jobs": len(tier._jobs), "storing": sum(tier._storing.values()), "pinned": pinned}

    def _pinned(self) -> int:
        """Pages of the host tier that something holds."""
        primary = self.engine._tiers.primary_tier
        return (
            int(primary._num_allocated_chunks)
            - len(primary._free_list)
            - int(primary._num_evictable_cache_chunks)
        )


if __name__ == "__main__":
    main(VaultBench)
