import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv import disk_read
from kv.disk import DiskStore
from kv.disk_read import UNIT_BYTES, Reader, is_aligned
from kv.disk_seal import Checked, Encrypted, Seal
from kv.errors import DamagedBlockError

KEY = b"k" * 36
BLOCK = 3 * UNIT_BYTES
SEALS = [Checked(), Encrypted(b"k" * 32)]


def memory(n_bytes: int) -> memoryview:
    """Aligned, as the host tier's rows are."""
    return memoryview(mmap.mmap(-1, n_bytes))


def stored(root: Path, seal: Seal = SEALS[0]) -> tuple[DiskStore, bytes, Path]:
    """A store with one block on the medium and out of the page cache, and its file."""
    content = os.urandom(BLOCK)
    store = DiskStore(root, "f", 1 << 20, seal)
    store.put("", KEY, memoryview(content))
    [path] = root.rglob("*.kv")
    dropped(path)
    return store, content, path


def dropped(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[memoryview]]]:
    """Whether each read was a direct one, and what it was to fill."""
    seen: list[tuple[bool, list[memoryview]]] = []
    real = os.preadv

    def preadv(file: int, room: Sequence[memoryview], at: int) -> int:
        direct = disk_read.fcntl.fcntl(file, disk_read.fcntl.F_GETFL) & os.O_DIRECT
        seen.append((bool(direct), list(room)))
        return real(file, room, at)

    monkeypatch.setattr("kv.disk_read.os.preadv", preadv)
    return seen


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is in the page cache, as far as the reader can tell."""
    monkeypatch.setattr("kv.disk_read._is_cached", lambda *_: False)


@pytest.mark.usefixtures("cold")
def test_an_aligned_row_is_filled_in_one_direct_read(
    tmp_path: Path, reads: list[tuple[bool, list[memoryview]]]
) -> None:
    """The block goes straight into the row: no bytes of it lie anywhere else."""
    store, content, _ = stored(tmp_path)
    row = memory(BLOCK)
    store.get("", KEY, row)
    assert bytes(row) == content
    [(direct, room)] = reads
    assert direct
    assert room[0].obj is row.obj
    assert sum(map(len, room)) == BLOCK + UNIT_BYTES


@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("shift", [0, 1, 512])
def test_a_block_comes_back_into_any_memory(tmp_path: Path, seal: Seal, shift: int) -> None:
    """Memory that is not aligned is filled by way of memory that is, which keeps no copy."""
    store, content, _ = stored(tmp_path, seal)
    row = memory(BLOCK + UNIT_BYTES)[shift : shift + BLOCK]
    store.get("", KEY, row)
    assert bytes(row) == content
    assert content[:64] not in bytes(store._reader.scratch(BLOCK + seal.overhead_bytes))


@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("refused", ["open", "read"])
def test_a_file_system_without_direct_reads_is_read_through_the_cache(
    tmp_path: Path, seal: Seal, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it says so at once or when it is read; it is asked once."""
    store, content, path = stored(tmp_path, seal)
    real, asked = {"open": os.open, "read": os.preadv}, []

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            asked.append(path)
            if refused == "open":
                raise OSError(errno.EINVAL, "Invalid argument")
        return real["open"](path, flags, mode)

    def reading(file: int, room: Sequence[memoryview], at: int) -> int:
        if disk_read.fcntl.fcntl(file, disk_read.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["read"](file, room, at)

    monkeypatch.setattr("kv.disk_read.os.open", opening)
    monkeypatch.setattr("kv.disk_read.os.preadv", reading)
    for _ in range(2):
        row = memory(BLOCK)
        store.get("", KEY, row)
        assert bytes(row) == content
        dropped(path)
    assert len(asked) == 1


@pytest.mark.usefixtures("cold")
@given(
    sizes=st.lists(
        st.sampled_from([1, 512, 5000, UNIT_BYTES, 2 * UNIT_BYTES]), min_size=1, max_size=8
    )
)
@settings(max_examples=40, deadline=None)
def test_reads_that_come_short_are_read_on(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    """However few bytes a read brings, on or off the unit, all of them come in the end."""
    root = tmp_path_factory.mktemp("short")
    store, content, _ = stored(root)
    left, real = list(sizes), os.preadv

    def short(file: int, room: Sequence[memoryview], at: int) -> int:
        got = real(file, room, at)
        kept = min(got, left.pop(0)) if left else got
        for rest in disk_read._from(room, kept):
            rest[:] = b"?" * len(rest)
        return kept

    row = memory(BLOCK)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kv.disk_read.os.preadv", short)
        store.get("", KEY, row)
    assert bytes(row) == content
    store.close()


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("seal", SEALS)
@pytest.mark.parametrize("harm", ["block", "seal", "cut", "unit", "grow", "pad", "empty"])
def test_a_damaged_file_is_a_miss_in_aligned_memory_too(
    tmp_path: Path, seal: Seal, harm: str
) -> None:
    """Bits of the block or its seal, and lengths on and off the unit."""
    store, _, path = stored(tmp_path, seal)
    content = bytearray(path.read_bytes())
    if harm in ("block", "seal"):
        content[100 if harm == "block" else -1] ^= 1
    cut = {"cut": -1, "unit": -UNIT_BYTES, "empty": -len(content)}.get(harm, len(content))
    grown = {"grow": 1, "pad": UNIT_BYTES}.get(harm, 0)
    path.write_bytes(content[:cut] + bytes(grown))
    dropped(path)
    with pytest.raises(DamagedBlockError):
        store.get("", KEY, memory(BLOCK))
    assert not store.has("", KEY)
    assert not path.exists()


def test_what_the_cache_has_is_read_from_it(
    tmp_path: Path, reads: list[tuple[bool, list[memoryview]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct read of a file that was just written would wait until it is on the medium."""
    store, content, _ = stored(tmp_path)
    for cached in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr("kv.disk_read._is_cached", lambda *_, here=cached: here)
            row = memory(BLOCK)
            store.get("", KEY, row)
        assert bytes(row) == content
    assert [direct for direct, _ in reads] == [False, True]


def test_the_kernel_tells_what_is_cached(tmp_path: Path) -> None:
    """A file that was just written is; where the kernel does not tell, nothing is."""
    path = tmp_path / "file"
    path.write_bytes(bytes(BLOCK))
    with path.open("rb") as file:
        told = disk_read._is_cached(file.fileno(), BLOCK)
    if not told:
        pytest.skip("cachestat is since Linux 6.5, and not allowed everywhere")
    dropped(path)
    with path.open("rb") as file:
        assert not disk_read._is_cached(file.fileno(), BLOCK)


def test_memory_is_aligned_where_it_begins_and_ends() -> None:
    """Both ends count, not only the length."""
    whole = memory(2 * UNIT_BYTES)
    assert is_aligned(whole)
    assert not is_aligned(whole[512 : 512 + UNIT_BYTES])
    assert not is_aligned(whole[:512])


def test_scratch_holds_a_byte_more_than_the_file() -> None:
    """So that a file that is longer than it should be is noticed, one of whole units too."""
    reader = Reader()
    for n_bytes in (1, UNIT_BYTES - 1, UNIT_BYTES, UNIT_BYTES + 1):
        scratch = reader.scratch(n_bytes)
        assert is_aligned(scratch)
        assert n_bytes < len(scratch) <= n_bytes + UNIT_BYTES
