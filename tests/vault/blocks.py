"""Blocks that tests put into a vault, and what they get out of it."""

from collections.abc import Callable, Mapping, Sequence

from kv.vault.orders import Outcome
from tests.unit.kv.vault_frames import frame_of
from workers.vault.client import VaultClient
from workers.vault.jobs import Block

RUN = b"run"


def frames(count: int, n_bytes: int, first: int = 0) -> dict[bytes, bytes]:
    """So many different blocks by key."""
    return {
        f"block-{at}".encode().ljust(32): frame_of(at + 1, n_bytes)
        for at in range(first, first + count)
    }


def put(
    client: VaultClient,
    blocks: Mapping[bytes, bytes],
    timeout_s: float = 10.0,
    tenant: str = "tag",
    ttl_s: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    run: bytes = RUN,
) -> list[str]:
    """What became of each: stored, or the reason why not. `meanwhile` is called between what the
    shard grants and what is written."""

    def fill(frame: bytes) -> Callable[[memoryview], None]:
        def write(into: memoryview) -> None:
            meanwhile()
            into[:] = frame

        return write

    chain, parent = [], None
    for key, frame in blocks.items():
        chain.append(Block(key, parent, len(frame), 1.0, fill(frame), ttl_s))
        parent = key
    verdicts = client.put(run, tenant, "raw", chain, timeout_s)
    return [v.reason or str(v.outcome) for v in verdicts]


def stored(client: VaultClient, blocks: Mapping[bytes, bytes], **kwargs: object) -> bool:
    """Put them, and whether all are there now."""
    return set(put(client, blocks, **kwargs)) == {str(Outcome.STORED)}  # type: ignore[arg-type]


def get(
    client: VaultClient,
    keys: Sequence[bytes],
    timeout_s: float = 10.0,
    run: bytes = RUN,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[bytes, bytes]:
    """What came; `meanwhile` is called as each does."""
    found: dict[bytes, bytes] = {}

    def take(key: bytes, frame: memoryview) -> None:
        found[key] = bytes(frame)
        meanwhile()

    assert client.get(run, keys, take, timeout_s) == list(found)
    return found
