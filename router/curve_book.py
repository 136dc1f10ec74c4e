"""Curves that outlive a cluster: for one model, what each kind of hardware, link and tier costs.

One JSON file, replaced whole under a lock, so that the ingresses of a node may share it: each puts
in what it knows. A file that cannot be read is begun anew, since engines measure themselves anyway.
"""

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from kv.curve import LinkCurve, PrefillCurve
from kv.errors import CurveError

logger = logging.getLogger(__name__)

VERSION = 1
# Curves of fewer requests than this are not worth keeping.
LEAST_SAMPLES = 8
SECONDS_BETWEEN = 30.0


class KeptPrefill(msgspec.Struct, frozen=True):
    """A prefill curve and how many requests it was made from."""

    base_s: float
    per_token_s: float
    per_token2_s: float
    samples: int

    @classmethod
    def of(cls, curve: PrefillCurve, samples: int) -> "KeptPrefill":
        return cls(curve.base_s, curve.per_token_s, curve.per_token2_s, samples)

    def curve(self) -> PrefillCurve:
        return PrefillCurve(self.base_s, self.per_token_s, self.per_token2_s)


class KeptLink(msgspec.Struct, frozen=True):
    """A link's curve, or a tier's, and how many handoffs or fetches it was made from."""

    latency_s: float
    per_byte_s: float
    samples: int

    def curve(self) -> LinkCurve:
        return LinkCurve(self.latency_s, self.per_byte_s)


class Book(msgspec.Struct, frozen=True):
    """Of one model: prefill curves by hardware, links by the hardware of both ends, tiers by that
    of who fetches (`router.tier_curves`)."""

    version: int = VERSION
    prefill: dict[str, KeptPrefill] = {}
    links: dict[str, KeptLink] = {}
    tiers: dict[str, KeptLink] = {}

    def with_(self, newer: "Book") -> "Book":
        """Both; of what both have, the newer."""
        links, tiers = self.links | newer.links, self.tiers | newer.tiers
        return Book(VERSION, self.prefill | newer.prefill, links, tiers)


def read(path: Path) -> Book:
    """What was kept; nothing where there is no file, or one that cannot be read."""
    try:
        book = msgspec.json.decode(path.read_bytes(), type=Book)
        for computing in book.prefill.values():
            computing.curve()
        for link in (*book.links.values(), *book.tiers.values()):
            link.curve()
    except FileNotFoundError:
        return Book()
    except (OSError, msgspec.MsgspecError, CurveError) as error:
        logger.warning("%s: curves not read, they are measured anew: %s", path, error)
        return Book()
    return book if book.version == VERSION else Book()


def keep(path: Path, newer: Book) -> None:
    """Add to the file, or replace there, what `newer` has. Raises OSError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(read(path).with_(newer)))
        draft.replace(path)


async def follow(path: Path, known: Callable[[], Book]) -> None:
    """Until cancelled: keep what is known, every half minute and at the end."""
    kept = Book()
    try:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN)
            kept = await asyncio.to_thread(_kept, path, known(), kept)
    finally:
        _kept(path, known(), kept)


def _kept(path: Path, newer: Book, kept: Book) -> Book:
    """What is in the file now: `kept`, if nothing is new or the file cannot be written."""
    if newer == kept or newer == Book():
        return kept
    try:
        keep(path, newer)
    except OSError as error:
        logger.warning("%s: curves not kept: %s", path, error)
        return kept
    return newer
