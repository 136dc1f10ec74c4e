"""One replica's blocks in a vault: host pages out and back in, each in a frame of its own.

A block's name in a vault is the fingerprint of all that its bytes depend on (`kv.fingerprint`),
then vLLM's hash and group; so replicas of several models, layouts and versions share a vault and
find nothing but their own. Questions, reads and writes go over connections of their own: none
waits for another kind.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kv.codecs.codec import Codec, CodecName
from kv.codecs.frame import HEADER_BYTES, open_verified, seal
from kv.codecs.page import PageShape
from kv.codecs.table import CODECS
from kv.errors import CodecError
from kv.fingerprint import fingerprint
from kv.vault.chains import Spot
from kv.vault.orders import Outcome
from workers import curve
from workers.messages import Keep
from workers.vault.client import STAGING_BYTES, ShardSeat, VaultClient
from workers.vault.jobs import LOST, Block

# What a shard's connections agree on: how blocks are named and framed here.
FORMAT = fingerprint({"names": "fingerprint, hash, group", "codec": CodecName.RAW})
# How the blocks of requests are kept that say nothing of it.
AS_ALL = Keep()
# Of the fingerprint in a frame.
_SEAL_BYTES = 16


@dataclass(frozen=True, slots=True)
class Page:
    """One block and its page in host memory."""

    key: bytes
    spot: Spot
    row: memoryview


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a store: `sent_bytes` of pages that the vault took, `lost` of which nobody
    said anything. `held` are the keys that are there now, whoever sent them; the others are not
    worth their place."""

    sent_bytes: int
    lost: int
    held: tuple[bytes, ...] = ()


class VaultPages:
    """See the module. `layout` is the fingerprint, of `page_bytes` each; a block is kept for
    `ttl_s` (None: for ever). `shape` is what codecs make of a page; without it all are stored raw.
    For the threads of a pool."""

    def __init__(
        self,
        shards: Iterable[str],
        keys: curve.ClientKeys,
        layout: bytes,
        page_bytes: int,
        ttl_s: float | None,
        shape: PageShape | None = None,
    ) -> None:
        self._layout, self._page_bytes, self._ttl_s = layout, page_bytes, ttl_s
        self._shape = shape
        self._seal = layout.ljust(_SEAL_BYTES, b"\0")
        self._frame_bytes = HEADER_BYTES + page_bytes
        staging_bytes = max(STAGING_BYTES, 4 * self._frame_bytes)
        seats = {name: ShardSeat() for name in shards}
        client = partial(VaultClient, seats, keys, FORMAT)
        self._asking = client(staging_bytes=0)
        self._reading = client(staging_bytes=staging_bytes)
        self._writing = client(staging_bytes=staging_bytes)

    def seat(self, addresses: Mapping[str, str]) -> None:
        """Where shards are reached now."""
        for name, address in addresses.items():
            for client in (self._asking, self._reading, self._writing):
                client.move(name, address)

    def await_up(self, timeout_s: float) -> bool:
        """Whether all shards are connected, within this time."""
        deadline_s = time.monotonic() + timeout_s
        clients = (self._asking, self._reading, self._writing)
        return all(client.await_up(deadline_s - time.monotonic()) for client in clients)

    def held(self, runs: Mapping[bytes, Sequence[bytes]], timeout_s: float) -> frozenset[bytes]:
        """Which blocks of these runs are there, as far as shards say so in time."""
        named = {self._name(run): [self._name(key) for key in keys] for run, keys in runs.items()}
        return frozenset(self._key(name) for name in self._asking.has(named, timeout_s))

    def store(
        self,
        tenant: str,
        pages: Iterable[Page],
        price: Callable[[Spot], float],
        timeout_s: float,
        keep: Keep = AS_ALL,
    ) -> Stored:
        """Copy pages into the vault; `price` is the seconds that a block saves."""
        codec = self._codec(keep)
        deadline_s = time.monotonic() + timeout_s
        filled: set[bytes] = set()
        sent_bytes, lost, held = 0, 0, list[bytes]()
        for run, members in _by_run(pages).items():
            blocks = [
                self._block(page, price(page.spot), filled, codec, keep.ttl_s) for page in members
            ]
            left_s = deadline_s - time.monotonic()
            verdicts = self._writing.put(self._name(run), tenant, codec.name, blocks, left_s)
            for verdict, block in zip(verdicts, blocks, strict=True):
                if verdict.outcome is Outcome.STORED:
                    held.append(self._key(block.key))
                    sent_bytes += self._page_bytes * (block.key in filled)
                lost += verdict == LOST
        return Stored(sent_bytes, lost, tuple(held))

    def load(
        self,
        pages: Iterable[Page],
        timeout_s: float,
        keep: Keep = AS_ALL,
        tell: Callable[[bytes], None] = lambda _: None,
        begun: Callable[[], None] = lambda: None,
    ) -> list[bytes]:
        """Fill pages from the vault; the keys of those that are whole now. `tell` has heard each as
        soon as it was, `begun` when it was a run's turn. The others' bytes are undefined. A page
        that another codec stored than `keep` allows is none of them."""
        deadline_s = time.monotonic() + timeout_s
        codec = self._codec(keep)
        loaded: list[bytes] = []
        for run, members in _by_run(pages).items():
            rows = {self._name(page.key): page.row for page in members}
            left_s = deadline_s - time.monotonic()
            take = partial(self._take, rows, codec, tell)
            taken = self._reading.get(self._name(run), list(rows), take, left_s, begun)
            loaded += map(self._key, taken)
        return loaded

    def forget(self, tags: Iterable[str], timeout_s: float) -> dict[str, str]:
        """Erase tenants on all shards; the complaint of each that did not, by its name."""
        done = self._writing.forget(tags, timeout_s)
        silent = {name: "no answer" for name, said in done.items() if said is None}
        failed = {n: "its disk fails" for n, said in done.items() if said and not said.erased}
        return silent | failed

    def close(self) -> None:
        """End all connections, once no call uses them."""
        for client in (self._asking, self._reading, self._writing):
            client.close()

    def _codec(self, keep: Keep) -> Codec:
        return CODECS[CodecName.RAW if keep.codec is None or self._shape is None else keep.codec]

    def _block(
        self,
        page: Page,
        seconds_saved: float,
        filled: set[bytes],
        codec: Codec,
        ttl_s: float | None,
    ) -> Block:
        name, spot, shape = self._name(page.key), page.spot, self._shape
        raw = shape is None or codec.name is CodecName.RAW

        def fill(frame: memoryview) -> None:
            if shape is None or raw:
                frame[HEADER_BYTES:] = page.row
            else:
                codec.encode(page.row[: shape.page_bytes], shape, frame[HEADER_BYTES:])
            seal(codec.name, self._seal, frame)
            filled.add(name)

        n_bytes = self._frame_bytes
        if shape is not None and not raw:
            n_bytes = HEADER_BYTES + codec.encoded_bytes(shape)
        parent = None if spot.parent is None else self._name(spot.parent)
        # A request may ask for longer than is usual, never for less.
        kept_s = None if self._ttl_s is None else max(self._ttl_s, ttl_s or 0.0)
        return Block(name, parent, n_bytes, seconds_saved, fill, kept_s)

    def _take(
        self,
        rows: Mapping[bytes, memoryview],
        codec: Codec,
        tell: Callable[[bytes], None],
        name: bytes,
        frame: memoryview,
    ) -> None:
        found, row, shape = open_verified(frame), rows[name], self._shape
        if found.fingerprint != self._seal or found.codec not in (CodecName.RAW, codec.name):
            what = f"{found.codec} of {found.fingerprint.hex()}"
            wanted = f"only {codec.name} of {self._seal.hex()} is read here"
            raise CodecError("vault block", what, wanted)
        if shape is None or found.codec == CodecName.RAW:
            row[:] = found.payload
        else:
            codec.decode(found.payload, shape, row[: shape.page_bytes])
            row[shape.page_bytes :] = bytes(len(row) - shape.page_bytes)
        tell(self._key(name))

    def _name(self, key: bytes) -> bytes:
        return self._layout + key

    def _key(self, name: bytes) -> bytes:
        return name[len(self._layout) :]


def _by_run(pages: Iterable[Page]) -> dict[bytes, list[Page]]:
    """Each run's pages from its start to its end: what comes behind a gap is of no use."""
    runs: dict[bytes, list[Page]] = {}
    for page in sorted(pages, key=lambda page: page.spot.start_token):
        runs.setdefault(page.spot.run, []).append(page)
    return runs
