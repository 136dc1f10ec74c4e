"""Curves that outlive a cluster."""

import asyncio
import random
from dataclasses import astuple
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kv.catalogue import Tier
from kv.curve import PrefillCurve, PrefillSample
from kv.fetch import GUESSES
from router.curve_book import Book, KeptLink, KeptPrefill, follow, keep, read
from router.fleet import Fleet
from router.member import Member
from router.speed import Speeds
from workers.messages import Role
from workers.sim import SimCosts, sim_replica

COSTS = SimCosts()
A, B = KeptPrefill(0.01, 0.002, 1e-8, 9), KeptPrefill(0.02, 0.004, 0.0, 90)


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    """Of what two clusters kept, the later; what only one knew stays."""
    path = tmp_path / "curves" / "model.json"
    assert read(path) == Book()
    keep(path, Book(prefill={"cpu": A, "gpu": A}, links={"x": KeptLink(0.01, 1e-9, 9)}))
    keep(path, Book(prefill={"cpu": B}))
    assert read(path) == Book(prefill={"cpu": B, "gpu": A}, links={"x": KeptLink(0.01, 1e-9, 9)})
    assert {each.name for each in path.parent.iterdir()} == {"model.json", "model.lock"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"prefill": 3}', b'{"version": 2}', b'{"prefill": {"cpu": {"base_s": 1}}}'],
)
def test_a_file_that_is_none_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    """Torn, of another version, or another's: engines measure themselves."""
    path = tmp_path / "model.json"
    path.write_bytes(content)
    assert read(path) == Book()
    keep(path, Book(prefill={"cpu": A}))
    assert read(path).prefill == {"cpu": A}


def test_tiers_are_kept_beside_links(tmp_path: Path) -> None:
    """Those that another cluster knew stay; a file of before there were any is read."""
    path = tmp_path / "model.json"
    disk, vault = KeptLink(0.01, 1e-9, 9), KeptLink(0.02, 2e-9, 90)
    path.write_bytes(
        b'{"version":1,"links":{"x":{"latency_s":0.01,"per_byte_s":1e-9,"samples":9}}}'
    )
    assert read(path) == Book(links={"x": disk})
    keep(path, Book(tiers={"cpu, disk": disk, "cpu, vault": disk}))
    keep(path, Book(tiers={"cpu, vault": vault}))
    assert read(path) == Book(links={"x": disk}, tiers={"cpu, disk": disk, "cpu, vault": vault})


@pytest.mark.parametrize(
    "negative",
    [
        Book(prefill={"cpu": KeptPrefill(-1.0, 0.002, 0.0, 9)}),
        Book(links={"x": KeptLink(-1.0, 1e-9, 9)}),
        Book(tiers={"cpu, disk": KeptLink(0.01, -1e-9, 9)}),
    ],
)
def test_a_curve_that_pays_is_not_believed(negative: Book, tmp_path: Path) -> None:
    """Whoever wrote it."""
    path = tmp_path / "model.json"
    path.write_bytes(msgspec.json.encode(negative))
    assert read(path) == Book()


async def test_an_ingress_keeps_what_it_knows_when_it_ends(tmp_path: Path) -> None:
    """Without having run for half a minute; one that knows nothing leaves the file alone."""
    path = tmp_path / "model.json"
    for known in (Book(prefill={"cpu": A}), Book()):
        task = asyncio.create_task(follow(path, lambda known=known: known))  # type: ignore[misc]
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert read(path).prefill == {"cpu": A}


def test_a_next_start_begins_with_what_was_kept() -> None:
    """Instead of a probe on busy cores; a probe that was faster is believed, since nothing makes a
    probe faster than an engine is."""
    for factor, expected in ((3.0, A.curve()), (0.01, None)):
        samples = tuple(
            (new, 0, factor * A.curve().seconds(new, 0)) for new in (32, 256, 1024, 2048)
        )
        replica = sim_replica("d", Role.DECODE, COSTS, hardware="cpu", prefill_samples=samples)
        speeds = Speeds({"cpu": A})
        speeds.learn(replica)
        told = speeds.of(replica, 0.0).curve
        wanted = expected or PrefillCurve(*(0.01 * cost for cost in astuple(A.curve())))
        for new in (32, 1024):
            assert told.seconds(new, 0) == pytest.approx(wanted.seconds(new, 0), rel=0.05)


def test_an_ingress_begins_with_the_tiers_of_its_book() -> None:
    """Until a replica of that hardware tells better."""
    nobody: Any = None
    book = Book(tiers={"cpu, peer": KeptLink(0.002, 3e-10, 9)})
    fleet = Fleet(nobody, nobody, nobody, b"", lambda: 0.0, random.Random(1), False, book)
    for hardware, latency_s in (("cpu", 0.002), ("gpu", GUESSES[Tier.PEER].latency_s)):
        replica = sim_replica("d", Role.DECODE, COSTS, hardware=hardware)
        member = Member(replica, lambda _: nobody, nobody, lambda: 0.0)
        assert fleet.peer_of(member).latency_s == latency_s


def test_what_few_requests_told_is_not_kept() -> None:
    """And of several of one kind, that of which most is known."""
    speeds = Speeds()
    replicas = [
        sim_replica(name, Role.DECODE, COSTS, hardware="cpu", epoch=name) for name in ("a", "b")
    ]
    for replica, requests in zip(replicas, (7, 20), strict=True):
        speeds.learn(replica)
        assert speeds.worth_keeping([replica], 0.0) == {}
        for number in range(requests):
            sample = PrefillSample(500 + number, 0, COSTS.prefill.seconds(500 + number, 0))
            speeds.saw(replica, sample, 0.0)
    kept = speeds.worth_keeping(replicas, 0.0)
    assert kept["cpu"].samples == 20
    assert kept["cpu"].curve() == speeds.of(replicas[1], 0.0).curve
