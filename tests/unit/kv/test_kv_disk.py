import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.disk import DiskStore, file_bytes
from kv.disk_seal import Checked, Encrypted, Seal, read_key
from kv.errors import DamagedBlockError, DiskError, LostSlotError

BLOCK = 5000
FILE = file_bytes(BLOCK)


ReadOnly = Callable[[], AbstractContextManager[None]]


def key(number: int) -> bytes:
    return number.to_bytes(36, "big")


def block(number: int) -> memoryview:
    return memoryview(bytes([number % 251]) * BLOCK)


def read(store: DiskStore, number: int, tag: str = "") -> bytes:
    into = bytearray(BLOCK)
    store.get(tag, key(number), memoryview(into))
    return bytes(into)


def file_of(root: Path, number: int) -> Path:
    [path] = root.rglob(f"{key(number).hex()}.kv")
    return path


def erase(store: DiskStore, tag: str) -> int:
    erased = store.drop(tag)
    store.purge(tag)
    return erased


def on_disk(root: Path) -> int:
    """Bytes that files take, by the file system's own count."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return sum(path.stat().st_blocks * 512 for path in files)


def test_a_block_comes_back_in_this_process_and_the_next(tmp_path: Path) -> None:
    """What was stored is read again, also by a later store of the same fingerprint."""
    store = DiskStore(tmp_path, "f", 10 * FILE)
    assert store.put("", key(1), block(1))
    assert read(store, 1) == bytes(block(1))
    store.close()
    later = DiskStore(tmp_path, "f", 10 * FILE)
    assert later.has("", key(1))
    assert not later.has("", key(2))
    assert later.used_bytes == FILE
    assert read(later, 1) == bytes(block(1))


def test_another_fingerprint_or_tag_finds_nothing(tmp_path: Path) -> None:
    """A block is found under the fingerprint and the tag that it was stored under."""
    store = DiskStore(tmp_path, "f", 10 * FILE)
    store.put("aa", key(1), block(1))
    assert not store.has("bb", key(1))
    store.close()
    assert not DiskStore(tmp_path, "g", 10 * FILE).has("aa", key(1))


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "swap", "gone"])
def test_a_damaged_block_is_refused_once_and_then_missed(tmp_path: Path, harm: str) -> None:
    """Whatever happened to the file, its bytes are not taken, and it is removed: the next
    lookup misses. A good block in another's place is damaged too."""
    store = DiskStore(tmp_path, "f", 10 * FILE)
    store.put("", key(1), block(1))
    store.put("", key(2), block(2))
    path, other = (file_of(tmp_path, number) for number in (1, 2))
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[BLOCK // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "grow":
        path.write_bytes(content + b"x")
    elif harm == "swap":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
    with pytest.raises((DamagedBlockError, FileNotFoundError)):
        read(store, 1)
    assert not store.has("", key(1))
    assert not path.exists()
    assert store.used_bytes == FILE
    assert store.take_removed() == [key(1)]
    assert store.put("", key(1), block(1))
    assert read(store, 1) == bytes(block(1))


@given(
    st.lists(st.tuples(st.sampled_from("pgte"), st.integers(0, 12)), max_size=60),
    st.integers(1, 6),
)
@settings(max_examples=30)
def test_the_budget_holds_whatever_is_done(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], room: int
) -> None:
    """Files never take more than the budget, the count of them is right, and what can be found
    is what was stored."""
    root = tmp_path_factory.mktemp("disk")
    store = DiskStore(root, "f", room * FILE + 100)
    for what, number in steps:
        if what == "p":
            assert store.put("", key(number), block(number))
        elif what == "g" and store.has("", key(number)):
            assert read(store, number) == bytes(block(number))
        elif what == "t":
            store.touch("", key(number))
        elif what == "e" and number == 0:
            erase(store, "")
        assert on_disk(root) <= store.used_bytes <= room * FILE + 100
    store.close()


def test_the_block_that_was_of_use_last_stays(tmp_path: Path) -> None:
    """Room is made by the oldest; reading and touching a block make it young."""
    store = DiskStore(tmp_path, "f", 3 * FILE)
    for number in (1, 2, 3):
        store.put("", key(number), block(number))
    read(store, 1)
    store.touch("", key(2))
    store.put("", key(4), block(4))
    assert [store.has("", key(number)) for number in (1, 2, 3, 4)] == [True, True, False, True]
    assert store.take_removed() == [key(3)]


def test_what_is_larger_than_the_budget_is_not_stored(tmp_path: Path) -> None:
    """No room is no error, and costs no other block."""
    store = DiskStore(tmp_path, "f", FILE)
    store.put("", key(1), block(1))
    assert not store.put("", key(2), memoryview(bytes(3 * BLOCK)))
    assert store.has("", key(1))


def test_older_fingerprints_count_and_go_first(tmp_path: Path) -> None:
    """A smaller budget, or a new model, finds the slot's old files within its own budget."""
    old = DiskStore(tmp_path, "old", 5 * FILE)
    for number in range(5):
        old.put("", key(number), block(number))
    old.close()
    new = DiskStore(tmp_path, "new", 3 * FILE)
    assert new.used_bytes == on_disk(tmp_path) == 3 * FILE
    for number in range(3):
        assert new.put("", key(number), block(number))
    assert all(new.has("", key(number)) for number in range(3))
    assert on_disk(tmp_path) == 3 * FILE
    assert new.take_removed() == []


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    """Folders 0700 and files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        store = DiskStore(tmp_path / "new", "f", FILE)
        store.put("", key(1), block(1))
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600)


def test_two_engines_take_two_slots(tmp_path: Path) -> None:
    """Neither counts or removes the other's; a slot that was given back is taken again."""
    first, second = DiskStore(tmp_path, "f", FILE), DiskStore(tmp_path, "f", FILE)
    first.put("", key(1), block(1))
    assert not second.has("", key(1))
    first.close()
    assert DiskStore(tmp_path, "f", FILE).has("", key(1))


def test_a_tenants_blocks_go_from_every_slot(tmp_path: Path) -> None:
    """Also from one that nobody holds, and what was being written meanwhile; others stay."""
    idle = DiskStore(tmp_path, "f", 9 * FILE)
    idle.put("aa", key(1), block(1))
    beside = DiskStore(tmp_path, "f", 9 * FILE)
    for tag in ("aa", "bb"):
        beside.put(tag, key(2), block(2))
    idle.close()
    assert erase(beside, "aa") == 1
    left = list(tmp_path.rglob("*.kv"))
    assert len(left) == 1
    assert beside.has("bb", key(2))
    assert beside.used_bytes == FILE


def test_what_a_killed_process_was_writing_is_erased(tmp_path: Path) -> None:
    """A draft in a slot that nobody holds has a tenant's bytes too."""
    killed = DiskStore(tmp_path, "f", 9 * FILE)
    killed.put("aa", key(1), block(1))
    stored = file_of(tmp_path, 1)
    stored.rename(stored.with_suffix(".tmp"))
    erase(DiskStore(tmp_path, "f", 9 * FILE), "aa")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error of that block; its room is given back and it can be stored later."""
    store = DiskStore(tmp_path, "f", 2 * FILE)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kv.disk_files.os.write", full)
        with pytest.raises(OSError, match="No space"):
            store.put("", key(1), block(1))
    assert store.used_bytes == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert store.put("", key(1), block(1))


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> ReadOnly:
    """Makes the file system refuse new files and removals, as one does after an error."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    @contextmanager
    def turned() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", refuse)
            patched.setattr("kv.disk_files.os.open", refuse)
            yield

    return turned


def test_a_disk_that_turns_read_only_costs_no_room(tmp_path: Path, read_only: ReadOnly) -> None:
    """What could not be written counts for nothing, and can be stored once the disk is back."""
    store = DiskStore(tmp_path, "f", 2 * FILE)
    with read_only(), pytest.raises(OSError, match="Read-only"):
        store.put("", key(1), block(1))
    assert store.used_bytes == 0
    assert store.put("", key(1), block(1))
    assert read(store, 1) == bytes(block(1))


def test_a_block_that_cannot_be_read_or_removed_is_missed(
    tmp_path: Path, read_only: ReadOnly
) -> None:
    """Its name goes although its file stays: it is not fetched again and again. The file counts
    until it is removed, and is tried again by whoever stores the block."""
    store = DiskStore(tmp_path, "f", 2 * FILE)
    store.put("", key(1), block(1))
    with read_only(), pytest.raises(OSError, match="Read-only"):
        read(store, 1)
    assert not store.has("", key(1))
    assert store.used_bytes == on_disk(tmp_path) == FILE
    assert store.put("", key(1), block(3))
    assert read(store, 1) == bytes(block(3))
    assert store.used_bytes == on_disk(tmp_path) == FILE


def test_a_file_that_cannot_be_removed_costs_another_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget counts it as long as it is there."""
    store = DiskStore(tmp_path, "f", 3 * FILE)
    for number in (1, 2, 3):
        store.put("", key(number), block(number))
    kept, unlink = file_of(tmp_path, 1), Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == kept:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert store.put("", key(4), block(4))
    assert [store.has("", key(number)) for number in (1, 2, 3, 4)] == [False, False, True, True]
    assert store.used_bytes == on_disk(tmp_path) == 3 * FILE
    assert not store.put("", key(1), block(1))


def test_files_that_an_erasure_leaves_are_told(tmp_path: Path, read_only: ReadOnly) -> None:
    """The error says how many; none of them is served, and erasing again removes them."""
    store = DiskStore(tmp_path, "f", 9 * FILE)
    for number in (1, 2):
        store.put("aa", key(number), block(number))
    store.put("bb", key(3), block(3))
    with read_only(), pytest.raises(DiskError, match="2 files"):
        erase(store, "aa")
    assert not store.has("aa", key(1))
    assert store.has("bb", key(3))
    erase(store, "aa")
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, "f", 2 * FILE)
    store.put("", key(1), block(1))
    draft = file_of(tmp_path, 1).with_name("half.tmp")
    draft.write_bytes(b"half")
    store.close()
    DiskStore(tmp_path, "f", 2 * FILE)
    assert not draft.exists()


def test_a_file_of_another_name_is_counted_and_goes_first(tmp_path: Path) -> None:
    """Somebody's copy beside the blocks does not keep the engine from starting."""
    store = DiskStore(tmp_path, "f", 2 * FILE)
    store.put("", key(1), block(1))
    stray = file_of(tmp_path, 1).with_name("block (copy).kv")
    stray.write_bytes(bytes(BLOCK))
    store.close()
    later = DiskStore(tmp_path, "f", 2 * FILE)
    assert later.used_bytes == 2 * FILE
    assert later.put("", key(2), block(2))
    assert not stray.exists()
    assert later.has("", key(1))


def test_a_tenant_may_be_erased_while_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that goes between its listing and its measuring is no error."""
    store = DiskStore(tmp_path, "f", 2 * FILE)
    store.put("", key(1), block(1))
    path, store_stat = file_of(tmp_path, 1), Path.stat
    store.close()

    def erased(self: Path, **kwargs: bool) -> os.stat_result:
        if self == path:
            os.unlink(path)
        return store_stat(self, **kwargs)

    monkeypatch.setattr(Path, "stat", erased)
    assert DiskStore(tmp_path, "f", 2 * FILE).used_bytes == 0


def test_threads_share_a_store(tmp_path: Path) -> None:
    """Reads, writes and evictions at once: a read gives the block or says that it is gone."""
    store = DiskStore(tmp_path, "f", 4 * FILE)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(150):
            number = (seed * 7 + step * 3) % 9
            store.put("", key(number), block(number))
            try:
                if read(store, number) != bytes(block(number)):
                    wrong.append(number)
            except OSError:
                pass

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert on_disk(tmp_path) == store.used_bytes <= 4 * FILE


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """The error names the folder and the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"tiers\.disk\.path"):
        DiskStore(tmp_path / "file", "f", FILE)


class SlowUnlink:
    """Removals wait until they are let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.go = threading.Event(), threading.Event()
        unlink = Path.unlink

        def slow(path: Path, missing_ok: bool = False) -> None:
            self.asked.set()
            assert self.go.wait(30)
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", slow)

    def while_waiting(self, work: Callable[[], object], look: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert self.asked.wait(30)
            look()
        finally:
            self.go.set()
            thread.join(30)


def test_what_an_engine_asks_between_steps_never_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While room is made on a slow disk, looking, touching, dropping and clearing answer at once;
    the budget counts a file until it is gone."""
    store = DiskStore(tmp_path, "f", 3 * FILE)
    for number, tag in ((1, "aa"), (2, "aa"), (3, "bb")):
        store.put(tag, key(number), block(number))
    disk = SlowUnlink(monkeypatch)

    def look() -> None:
        assert not store.has("aa", key(1))
        store.touch("bb", key(3))
        assert store.drop("aa") == 1
        assert store.take_removed() == [key(1), key(2)]
        assert store.used_bytes == on_disk(tmp_path) == 3 * FILE
        store.clear()
        assert not store.has("bb", key(3))

    disk.while_waiting(lambda: store.put("bb", key(4), block(4)), look)
    store.sweep()
    assert store.has("bb", key(4))
    assert store.used_bytes == on_disk(tmp_path) == FILE


def test_a_block_stored_anew_outlives_the_removal_of_its_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file, two blocks in turn: the second is written once the first is unlinked."""
    store = DiskStore(tmp_path, "f", 3 * FILE)
    store.put("aa", key(1), block(1))
    store.drop("aa")
    disk, again = (
        SlowUnlink(monkeypatch),
        threading.Thread(target=lambda: store.put("aa", key(1), block(2))),
    )

    def look() -> None:
        again.start()
        again.join(0.2)  # time to go wrong in

    disk.while_waiting(store.sweep, look)
    again.join(30)
    assert read(store, 1, "aa") == bytes(block(2))


def test_a_tenants_block_that_is_being_written_is_gone_when_its_erasure_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order comes between the writing of a file and its entry in the books."""
    store, rename = DiskStore(tmp_path, "f", 3 * FILE), Path.rename

    def ordered(path: Path, target: Path) -> Path:
        store.drop("aa")
        purge.start()
        return rename(path, target)

    purge = threading.Thread(target=store.purge, args=("aa",))
    monkeypatch.setattr(Path, "rename", ordered)
    store.put("aa", key(1), block(1))
    purge.join(30)
    assert not purge.is_alive()
    assert on_disk(tmp_path) == store.used_bytes == 0


@pytest.mark.parametrize("where", ["root", "slot"])
@pytest.mark.parametrize("wrong", ["symlink", "user", "mode"])
def test_a_folder_that_others_could_steer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, wrong: str
) -> None:
    """A symlink, another user's folder, and one that others may write to; the error names the
    folder and the setting."""
    root = tmp_path / "root"
    folder = root if where == "root" else root / "slot-0"
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if wrong == "symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
    if wrong == "mode":
        folder.chmod(0o770)
    elif wrong == "user":
        monkeypatch.setattr("kv.disk_files.os.geteuid", lambda: os.getuid() + 1)
        folder = root  # whose user is asked first
    with pytest.raises(DiskError, match=rf"^{folder}: .*tiers\.disk\.path"):
        DiskStore(root, "f", FILE)
    assert not list((tmp_path / "elsewhere").glob("*"))


@pytest.mark.parametrize("anew", [False, True])
def test_a_slot_that_was_taken_away_is_written_to_no_more(tmp_path: Path, anew: bool) -> None:
    """Nor read, nor cleaned: the folder may be another process's by now."""
    root = tmp_path / "root"
    store = DiskStore(root, "f", 3 * FILE)
    store.put("aa", key(1), block(1))
    shutil.rmtree(root)
    other = DiskStore(root, "f", 3 * FILE) if anew else None
    if other is not None:
        other.put("aa", key(1), block(2))
    with pytest.raises(LostSlotError, match="taken away"):
        store.put("aa", key(2), block(2))
    assert not store.has("aa", key(1))
    assert store.take_removed() == [key(1)]
    assert root.exists() == anew
    if other is not None:
        store.clear()
        store.sweep()
        assert read(other, 1, "aa") == bytes(block(2))


class TestEncrypted:
    """Blocks under a key."""

    KEY = bytes(range(32))

    def test_a_block_comes_back_and_its_bytes_are_not_in_the_file(self, tmp_path: Path) -> None:
        """Also in the next process; two files of the same block differ."""
        store = DiskStore(tmp_path, "f", 10 * FILE, Encrypted(self.KEY))
        for number in (1, 252):  # the same bytes
            store.put("", key(number), block(number))
        one, other = (file_of(tmp_path, number).read_bytes() for number in (1, 252))
        assert bytes(block(1))[:8] not in one
        assert one != other
        assert store.used_bytes == on_disk(tmp_path)
        store.close()
        assert read(DiskStore(tmp_path, "f", 10 * FILE, Encrypted(self.KEY)), 1) == bytes(block(1))

    @pytest.mark.parametrize("harm", ["key", "flip", "name", "none"])
    def test_what_is_not_of_this_key_and_name_is_refused(self, tmp_path: Path, harm: str) -> None:
        """Another key, changed bytes, a file in another's place, and a block that was stored
        without a key."""
        seal: Seal = Checked() if harm == "none" else Encrypted(self.KEY)
        store = DiskStore(tmp_path, "f", 10 * FILE, seal)
        for number in (1, 2):
            store.put("", key(number), block(number))
        path = file_of(tmp_path, 1)
        if harm == "flip":
            content = bytearray(path.read_bytes())
            content[BLOCK // 2] ^= 1
            path.write_bytes(content)
        elif harm == "name":
            path.write_bytes(file_of(tmp_path, 2).read_bytes())
        store.close()
        key_now = bytes(32) if harm == "key" else self.KEY
        later = DiskStore(tmp_path, "f", 10 * FILE, Encrypted(key_now))
        with pytest.raises(DamagedBlockError):
            read(later, 1)
        assert not later.has("", key(1))

    def test_a_key_is_read_from_a_file_of_its_users_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Anything else is refused by the name of the setting, with a remedy."""
        path = tmp_path / "key"
        path.write_bytes(self.KEY)
        path.chmod(0o600)
        assert read_key(path) == self.KEY
        link = tmp_path / "link"
        link.symlink_to(path)
        for wrong in (link, tmp_path / "absent"):
            with pytest.raises(DiskError, match=r"tiers\.disk\.key_file .*cannot be read"):
                read_key(wrong)
        path.chmod(0o640)
        with pytest.raises(DiskError, match="mode 640"):
            read_key(path)
        path.chmod(0o600)
        with monkeypatch.context() as patched:
            patched.setattr("kv.disk_seal.os.geteuid", lambda: os.getuid() + 1)
            with pytest.raises(DiskError, match="wanted"):
                read_key(path)
        for content in (self.KEY[:-1], self.KEY + b"\n"):
            path.write_bytes(content)
            with pytest.raises(DiskError, match="not 32"):
                read_key(path)

    def test_keys_have_ids_that_tell_them_apart(self) -> None:
        """An id is no part of its key."""
        one, other = Encrypted(self.KEY), Encrypted(bytes(32))
        assert one.key_id != other.key_id
        assert one.key_id == Encrypted(self.KEY).key_id
        assert one.key_id not in self.KEY.hex()
