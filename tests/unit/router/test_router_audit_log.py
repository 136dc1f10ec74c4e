"""The audit's writer: it never holds up or fails who it writes for, and counts what it lost."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kv.audit import Entry, read
from router.audit import NO_FOOTPRINT, Footprint, Record
from router.audit_log import AuditLog
from router.entry import Scribe
from router.pseudonyms import Pseudonyms
from router.rotation import RotatingLines, lines_of, newest_first
from router.settings import AuditPlace
from tests.unit.router.audited import Clock, audit_of, footprint, remote, request

WITHIN_S = 20.0


def scribe(clock: Callable[[], float]) -> Scribe:
    return Scribe(Pseudonyms(b"secret"), "smollm2", clock, Clock(5000.0))


@pytest.fixture
def place(tmp_path: Path) -> AuditPlace:
    return AuditPlace(str(tmp_path / "audit"), 100_000, 3)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(place: AuditPlace, clock: Clock) -> Iterator[AuditLog]:
    made = AuditLog(place, "ingress-0", scribe(clock), clock)
    yield made
    made.close(WITHIN_S)


def written(place: AuditPlace) -> list[Entry]:
    folder = Path(place.folder)
    if not folder.exists():
        return []
    lines = (line for path in reversed(newest_first(folder)) for line in lines_of(path))
    return list(read(lines, lambda bad: pytest.fail(str(bad))))


def await_that(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def closed(log: AuditLog | None, clock: Clock, count: int, first: int = 0) -> None:
    """So many requests, from their plan to their end."""
    audit = audit_of(clock, log=log)
    for number in range(first, first + count):
        clock.now_s = 100.0
        remote(clock, audit, request(f"r{number}"))


def test_each_closed_record_is_a_line(log: AuditLog, place: AuditPlace, clock: Clock) -> None:
    """In the order of their ends, with their blocks' names."""
    closed(log, clock, 50)
    log.close(WITHIN_S)
    entries = written(place)
    assert [entry.request_id for entry in entries] == [f"r{number}" for number in range(50)]
    assert {len(entry.asked.names()) for entry in entries} == {2}
    assert log.dropped == 0


def test_files_rotate_under_load(place: AuditPlace, clock: Clock) -> None:
    """What is configured bounds what is kept, and what is kept is readable."""
    small = AuditPlace(place.folder, 65_536, 2)
    log = AuditLog(small, "ingress-0", scribe(clock), clock)
    closed(log, clock, 200)
    log.close(WITHIN_S)
    sizes = [path.stat().st_size for path in newest_first(Path(place.folder))]
    assert len(sizes) == 2
    assert max(sizes) <= 65_536
    assert written(small)[-1].request_id == "r199"


@pytest.fixture
def goes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that hangs until this is set."""
    event, append = threading.Event(), RotatingLines.append

    def hanging(lines: RotatingLines, line: bytes) -> None:
        event.wait(WITHIN_S)
        append(lines, line)

    monkeypatch.setattr(RotatingLines, "append", hanging)
    yield event
    event.set()


def test_a_disk_that_hangs_costs_records_and_no_time(
    place: AuditPlace, clock: Clock, goes_on: threading.Event
) -> None:
    """While a write stands still the queue fills, then records are dropped; nobody waits, and what
    waited is written once the disk goes on."""
    log = AuditLog(place, "ingress-0", scribe(clock), clock, waiting=10)
    began = time.perf_counter()
    closed(log, clock, 200)
    assert time.perf_counter() - began < 2.0
    assert log.dropped >= 200 - 11
    goes_on.set()
    log.close(WITHIN_S)
    assert len(written(place)) == 200 - log.dropped


def test_long_prompts_that_wait_for_a_disk_are_bounded_too(
    place: AuditPlace, clock: Clock, goes_on: threading.Event
) -> None:
    """By their blocks: names of a hundred prompts of a million tokens would fill the memory."""
    log = AuditLog(place, "ingress-0", scribe(clock), clock)
    record, _ = ended(clock)
    long = Footprint([bytes(16)] * 300_000, 4, 1000)
    for _ in range(10):
        log.add(record, long)
    assert log.dropped == 7
    goes_on.set()
    log.close(WITHIN_S)
    assert log.dropped == 7
    assert len(written(place)) == 3


def test_a_hung_disk_does_not_keep_an_ingress_from_ending(
    place: AuditPlace, clock: Clock, goes_on: threading.Event
) -> None:
    """Closing gives up after its time, whether or not there was room for its word."""
    for waiting in (2, 100):
        log = AuditLog(place, "ingress-0", scribe(clock), clock, waiting=waiting)
        closed(log, clock, 10)
        began = time.perf_counter()
        log.close(0.2)
        assert time.perf_counter() - began < 5.0


def test_what_cannot_be_written_is_counted_and_told_once_a_minute(
    log: AuditLog, place: AuditPlace, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is no folder: each record is counted, the log has one line a minute with the
    reason, and requests go on."""
    Path(place.folder).write_text("in the way")
    with caplog.at_level(logging.WARNING):
        closed(log, clock, 5)
        await_that(lambda: log.dropped == 5)
        # Another test's log may still be ending.
        own = f"; {place.folder}: File exists"
        assert [r.message for r in caplog.records if r.message.endswith(own)] == [
            f"audit: records not written: 1{own}"
        ]
        clock.now_s = 161.0
        log.add(*ended(clock))
        await_that(lambda: log.dropped == 6)
    said = [r.message for r in caplog.records if r.message.endswith(own)]
    assert said[1:] == [f"audit: records not written: 5{own}"]


def ended(clock: Clock) -> tuple[Record, Footprint]:
    """A closed record that takes no time on the clock."""
    asked = request("late")
    before = clock.now_s
    record = remote(clock, audit_of(clock), asked)
    clock.now_s = before
    return record, footprint(asked)


def test_a_disk_that_is_well_again_is_used_again(
    log: AuditLog, place: AuditPlace, clock: Clock
) -> None:
    """After a second of rest, in which records are dropped and no disk is asked."""
    blocker = Path(place.folder)
    blocker.write_text("in the way")
    log.add(*ended(clock))
    await_that(lambda: log.dropped == 1)
    blocker.unlink()
    log.add(*ended(clock))
    await_that(lambda: log.dropped == 2)
    assert not blocker.exists()
    clock.now_s += 1.5
    log.add(*ended(clock))
    await_that(lambda: len(written(place)) == 1)
    assert log.dropped == 2


def test_a_record_that_cannot_be_written_down_costs_itself_alone(
    log: AuditLog, place: AuditPlace, clock: Clock
) -> None:
    """A fault of ours in one record is no reason to stop writing the others."""
    record, _ = ended(clock)
    record.planned_at.clear()
    log.add(record, NO_FOOTPRINT)
    log.add(*ended(clock))
    await_that(lambda: len(written(place)) == 1)
    assert log.dropped == 1


def test_what_was_dropped_is_a_metric(log: AuditLog, place: AuditPlace, clock: Clock) -> None:
    """`breakeven_audit_dropped_total`, from 0 on."""
    registry = CollectorRegistry()
    registry.register(log)
    assert registry.get_sample_value("breakeven_audit_dropped_total") == 0
    Path(place.folder).write_text("in the way")
    closed(log, clock, 3)
    await_that(lambda: registry.get_sample_value("breakeven_audit_dropped_total") == 3)


def test_taking_a_record_costs_microseconds(log: AuditLog, clock: Clock) -> None:
    """The event loop only queues it: a thousand take a small part of a second."""
    item = ended(clock)
    began = time.perf_counter()
    for _ in range(900):
        log.add(*item)
    assert time.perf_counter() - began < 1.0
