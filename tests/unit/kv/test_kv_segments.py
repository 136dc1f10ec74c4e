"""Blocks on disk: what was acknowledged is served with its exact bytes, whatever happened."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.errors import SegmentError, SegmentFullError
from kv.tiers import files, frames
from kv.tiers.segments import SegmentStore
from tests.unit.kv.vault_blocks import key_of, payload_of

WRITER = Path(__file__).with_name("vault_writer.py")
BUDGET, SEGMENT = 100_000, 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., SegmentStore]]:
    """Opens the folder, anew at each call: what was open before is closed without a commit."""
    stores: list[SegmentStore] = []

    def open_store(budget_bytes: int = BUDGET, segment_bytes: int = SEGMENT) -> SegmentStore:
        for store in stores:
            store.close()
        stores.append(SegmentStore(folder, budget_bytes, segment_bytes))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def put(store: SegmentStore, *numbers: int) -> None:
    for number in numbers:
        store.append(key_of(number), f"n{number}".encode(), payload_of(number))
    assert set(store.commit()) == {key_of(number) for number in numbers}


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.seg"))


def test_a_restart_serves_what_was_acknowledged(opened: Callable[..., SegmentStore]) -> None:
    """Keys, notes and sizes are known at once, and the bytes are the same."""
    put(opened(), 1, 2, 3)
    store = opened()
    assert list(store.notes()) == [
        (key_of(n), f"n{n}".encode(), len(payload_of(n))) for n in (1, 2, 3)
    ]
    assert [store.read(key_of(n)) for n in (1, 2, 3)] == [payload_of(n) for n in (1, 2, 3)]
    assert store.read(key_of(4)) is None


def test_an_opening_reads_no_payloads(
    opened: Callable[..., SegmentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of a large vault takes the time of its index."""
    store = opened()
    for number in range(8):
        store.append(key_of(number), b"", bytes(900))
    store.commit()
    read_bytes = 0
    pread = os.pread

    def counted(fd: int, n_bytes: int, offset: int) -> bytes:
        nonlocal read_bytes
        found = pread(fd, n_bytes, offset)
        read_bytes += len(found)
        return found

    monkeypatch.setattr(os, "pread", counted)
    assert len(opened()) == 8
    assert read_bytes < 8 * 100


def test_files_are_the_users_alone(opened: Callable[..., SegmentStore], folder: Path) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        put(opened(), 1)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_others_may_read_is_refused(folder: Path) -> None:
    """KV can be turned back into the prompt's text."""
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(SegmentError, match="mode 755"):
        SegmentStore(folder, BUDGET, SEGMENT)


def test_two_processes_do_not_share_a_folder(opened: Callable[..., SegmentStore]) -> None:
    """The second is told, before it cuts what the first is writing."""
    store = opened()
    with pytest.raises(SegmentError, match="another process"):
        SegmentStore(store._folder, BUDGET, SEGMENT)


@given(cut=st.integers(1, 4000), kept=st.integers(0, 6))
@settings(max_examples=40)
def test_a_torn_tail_is_cut(tmp_path_factory: pytest.TempPathFactory, cut: int, kept: int) -> None:
    """Wherever a file ends, whole blocks before that are served and the next ones follow them."""
    folder = tmp_path_factory.mktemp("torn") / "vault"
    store = SegmentStore(folder, BUDGET * 9, SEGMENT * 9)
    put(store, *range(kept + 1))
    store.close()
    (path,) = segments(folder)
    ends = [frames.PREFIX_BYTES]
    for n in range(kept + 1):
        sized = SegmentStore.frame_bytes(key_of(n), f"n{n}".encode(), len(payload_of(n)))
        ends.append(ends[-1] + sized)
    size = max(0, path.stat().st_size - cut)
    os.truncate(path, size)
    store = SegmentStore(folder, BUDGET * 9, SEGMENT * 9)
    whole = [n for n in range(kept + 1) if ends[n + 1] <= size]
    assert [key for key, _, _ in store.notes()] == [key_of(n) for n in whole]
    assert all(store.read(key_of(n)) == payload_of(n) for n in whole)
    put(store, 99)
    store.close()
    store = SegmentStore(folder, BUDGET * 9, SEGMENT * 9)
    assert len(store) == len(whole) + 1
    store.close()


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
@settings(max_examples=60)
def test_a_flipped_byte_costs_one_block_at_most(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    """In header, key, note or payload: that block is a miss, and all others are right. Only a
    segment whose first bytes are damaged is lost whole."""
    folder = tmp_path_factory.mktemp("flip") / "vault"
    store = SegmentStore(folder, BUDGET * 9, SEGMENT * 9)
    put(store, *range(5))
    store.close()
    (path,) = segments(folder)
    damaged = bytearray(path.read_bytes())
    at = frames.PREFIX_BYTES + at % (len(damaged) - frames.PREFIX_BYTES)
    damaged[at] ^= flip
    path.write_bytes(damaged)
    store = SegmentStore(folder, BUDGET * 9, SEGMENT * 9)
    found = {n: store.read(key_of(n)) for n in range(5)}
    assert all(payload in (None, payload_of(n)) for n, payload in found.items())
    missed = [n for n, payload in found.items() if payload is None]
    assert len(missed) == 1
    assert len(store) == 4
    store.close()


def test_a_payload_that_looks_like_a_frame_is_none(opened: Callable[..., SegmentStore]) -> None:
    """Bytes that a client chose cannot become a block of another key, even past a damaged header:
    frames carry a mark that only their own file has."""
    store = opened()
    head = frames.packed(bytes(frames.MARK_BYTES), b"forged", b"", b"x")
    store.append(b"honest", b"", head + b"x")
    store.commit()
    (path,) = segments(store._folder)
    damaged = bytearray(path.read_bytes())
    damaged[frames.PREFIX_BYTES + frames.HEADER_BYTES] ^= 1
    path.write_bytes(damaged)
    store = opened()
    assert len(store) == 0


def test_a_deleted_block_stays_deleted(opened: Callable[..., SegmentStore]) -> None:
    """After a restart too."""
    store = opened()
    put(store, 1, 2)
    store.delete([key_of(1)])
    store.commit()
    store = opened()
    assert (store.read(key_of(1)), store.read(key_of(2))) == (None, payload_of(2))


def test_erased_bytes_are_not_on_the_disk(opened: Callable[..., SegmentStore]) -> None:
    """Nor are those of blocks that had been evicted, their keys and notes; others are served."""
    store = opened()
    for key in (b"a0", b"b0", b"a1", b"b1", b"a2"):
        store.append(key, b"noted " + key, (b"secret" if key < b"b" else b"public") * 9)
    store.commit()
    store.delete([b"a1"])
    store.erase([b"a0", b"a2", b"unknown"])
    (path,) = segments(store._folder)
    assert not [word for word in (b"secret", b"a0", b"a1", b"a2") if word in path.read_bytes()]
    for _ in range(2):
        assert [key for key, _, _ in store.notes()] == [b"b0", b"b1"]
        assert [store.read(key) for key in (b"b0", b"b1")] == [b"public" * 9] * 2
        store = opened()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=150))
@settings(max_examples=30)
def test_the_budget_holds_and_what_fits_the_capacity_always_finds_room(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]
) -> None:
    """Whatever was deleted in between, and a restart at the end finds the same."""
    folder = tmp_path_factory.mktemp("full") / "vault"
    store = SegmentStore(folder, 40_000, 5_000)
    model: set[int] = set()
    for keep, n in [*steps, *((True, n) for n in range(31))]:
        n_bytes = store.frame_bytes(key_of(n), b"", len(payload_of(n)))
        if not keep:
            store.delete([key_of(n)])
            model.discard(n)
        elif n in model or store.live_bytes + n_bytes <= store.capacity_bytes:
            store.append(key_of(n), b"", payload_of(n))
            model.add(n)
        on_disk = sum(path.stat().st_size for path in segments(folder))
        assert on_disk == store.n_bytes <= 40_000
    store.commit()
    for _ in range(2):
        assert {key for key, _, _ in store.notes()} == {key_of(n) for n in model}
        assert all(store.read(key_of(n)) == payload_of(n) for n in model)
        store.close()
        store = SegmentStore(folder, 40_000, 5_000)
    store.close()


def test_a_full_budget_is_a_clear_error_and_loses_nothing(
    opened: Callable[..., SegmentStore],
) -> None:
    """What was stored is served, and a delete makes room again."""
    store = opened(30_000, 10_000)
    stored = []
    for n in range(100):
        try:
            store.append(n.to_bytes(2, "big"), b"", bytes([n]) * 2_000)
        except SegmentFullError as error:
            assert "raise the budget" in str(error)  # noqa: PT017
            break
        stored.append(n)
    assert 0 < len(stored) < 15
    store.commit()
    assert [store.read(n.to_bytes(2, "big")) for n in stored] == [
        bytes([n]) * 2_000 for n in stored
    ]
    store.delete([n.to_bytes(2, "big") for n in stored[::2]])
    store.append(b"again", b"", bytes(2_000))


def test_a_block_larger_than_a_segment_is_refused(opened: Callable[..., SegmentStore]) -> None:
    """With both sizes."""
    with pytest.raises(SegmentFullError, match="a segment takes 9984"):
        opened().append(b"k", b"", bytes(10_000))


def test_a_folder_beyond_its_budget_is_refused(opened: Callable[..., SegmentStore]) -> None:
    """Rather than deleting what an operator stored under a larger one."""
    store = opened()
    for n in range(30):
        store.append(key_of(n), b"", bytes(2_000))
    store.commit()
    with pytest.raises(SegmentError, match="raise the budget"):
        opened(30_000, 10_000)
    assert len(opened()) == 30


_FULL_DISK = """
import resource, sys
from pathlib import Path
from kv.errors import SegmentFullError
from kv.tiers.segments import SegmentStore
from tests.unit.kv.vault_blocks import key_of
resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))
store = SegmentStore(Path(sys.argv[1]), 900_000, 300_000)
for n in range(9):
    try:
        store.append(key_of(n), b"", bytes([n]) * 1_500)
    except SegmentFullError as error:
        print(n, error)
        break
committed = store.commit()
assert len(committed) == n, committed
assert all(store.read(key_of(at)) == bytes([at]) * 1_500 for at in range(n))
"""


def test_a_disk_that_takes_no_more_loses_nothing(
    folder: Path, opened: Callable[..., SegmentStore]
) -> None:
    """The kernel cuts a write short and refuses the rest: the error says so, all before it is
    acknowledged, and half a block is not left behind."""
    root = WRITER.parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 ")
    assert "File too large" in done.stdout
    assert "free space" in done.stdout
    store = opened(900_000, 300_000)
    assert [store.read(key_of(n)) for n in range(4)] == [bytes([n]) * 1_500 for n in range(4)]
    assert sum(path.stat().st_size for path in segments(folder)) == store.n_bytes


def test_a_failed_fsync_acknowledges_nothing(
    opened: Callable[..., SegmentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be made durable is dropped, since the next fsync would not tell; what was
    acknowledged before stays."""
    store = opened()
    put(store, 1)
    store.append(key_of(2), b"", payload_of(2))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SegmentError, match="fsync of 1 blocks"):
            store.commit()
    assert store.commit() == ()
    assert (store.read(key_of(1)), store.read(key_of(2))) == (payload_of(1), None)


def test_an_erasure_whose_fsync_fails_acknowledges_nothing_later(
    opened: Callable[..., SegmentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It synced what had been appended too: a commit behind it cannot tell what became of that."""
    store = opened()
    put(store, 1, 2)
    store.append(key_of(3), b"", payload_of(3))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SegmentError, match="erasing"):
            store.erase((key_of(1),))
    assert store.commit() == ()
    assert [store.read(key_of(n)) for n in (1, 2, 3)] == [None, payload_of(2), None]


def test_a_compaction_that_fails_loses_nothing(
    opened: Callable[..., SegmentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The originals are still there, and are served from there."""
    store = opened()
    put(store, *range(20))
    for at in range(0, 20, 2):
        store.delete([key_of(at)])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SegmentError, match="compacting"):
            store.compact()
    right = {n: payload_of(n) for n in range(1, 20, 2)}
    assert {n: store.read(key_of(n)) for n in right} == right
    store = opened()
    assert {n: store.read(key_of(n)) for n in right} == right
    assert len(store) == len(right)


def test_a_copy_that_is_not_whole_does_not_replace_its_original(
    opened: Callable[..., SegmentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power fails before a compaction's copies are durable: the originals are served."""
    store = opened()
    put(store, *range(20))
    for at in range(0, 20, 2):
        store.delete([key_of(at)])
    before_bytes = store.n_bytes
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "gone")))
        with pytest.raises(SegmentError, match="compacting"):
            store.compact()
    *_, copies = segments(store._folder)
    assert store.n_bytes > before_bytes + 100
    damaged = copies.read_bytes()
    copies.write_bytes(damaged[: len(damaged) - 100] + bytes(100))
    right = {n: payload_of(n) for n in range(1, 20, 2)}
    assert {n: store.read(key_of(n)) for n in right} == right
    store = opened()
    assert {n: store.read(key_of(n)) for n in right} == right


def test_nothing_on_disk_is_ever_unpickled() -> None:
    """Bytes from a disk or a network must not run code."""
    for module in (files, frames, sys.modules[SegmentStore.__module__]):
        assert module.__file__ is not None
        assert "pickle" not in Path(module.__file__).read_text().replace("unpickled", "")


def test_an_acknowledged_block_survives_kill_9(folder: Path) -> None:
    """A real process, killed at random moments of writing, deleting and compacting, eight times
    over one folder: every block it acknowledged and had not begun to delete is there with its
    exact bytes, and nothing is there with others."""
    random, first = Random(9), 0
    stored: set[bytes] = set()
    maybe: set[bytes] = set()
    for _ in range(8):
        command = [sys.executable, str(WRITER), str(folder), str(first), "400000", "20000"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = [writer.stdout.readline()]
        time.sleep(random.uniform(0.0, 0.15))
        writer.kill()
        told += writer.stdout.read().splitlines(keepends=True)
        writer.wait()
        writer.stdout.close()
        for line in told:
            if line.endswith(b"\n"):
                word, key = line.decode().split()
                stored.add(bytes.fromhex(key))
                if word == "deleting":
                    maybe.add(bytes.fromhex(key))
        first = max(int.from_bytes(key, "big") for key in stored) + 1
        first += 5  # what was written and not acknowledged may be there
        store = SegmentStore(folder, 400_000, 20_000)
        found = {key for key, _, _ in store.notes()}
        assert stored - maybe <= found
        for key in found:
            assert store.read(key) == payload_of(int.from_bytes(key, "big"))
        # Room for the next round.
        store.delete(list(found))
        store.commit()
        store.close()
        stored, maybe = {key_of(first)}, {key_of(first)}
