"""Lines in files: bounded, private, and whole again after whatever went wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.rotation import RotatingLines, lines_of, newest_first

ROOT = Path(__file__).resolve().parents[3]


def line(number: int, n_bytes: int = 100) -> bytes:
    return f"{number:0{n_bytes - 1}d}\n".encode()


def append_all(lines: RotatingLines, wanted: Iterable[int]) -> None:
    for number in wanted:
        lines.append(line(number))


def numbers(place: Path) -> list[int]:
    """What all files hold, from the oldest line to the newest."""
    return [int(text) for path in reversed(newest_first(place)) for text in lines_of(path)]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(100, 500))
def test_the_last_lines_stay_and_files_stay_small(
    tmp_path_factory: pytest.TempPathFactory, count: int, files: int, file_bytes: int
) -> None:
    """However many are written: a bounded number of bounded files holds the newest, in order."""
    folder = tmp_path_factory.mktemp("rotation") / "audit"
    lines = RotatingLines(folder, "ingress-0", file_bytes, files)
    for number in range(count):
        lines.append(line(number))
    lines.close()
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(sizes) <= files
    assert max(sizes) <= file_bytes
    kept = numbers(folder)
    assert kept == list(range(count - len(kept), count))
    a_file = file_bytes // 100
    assert len(kept) == count or len(kept) > (files - 1) * a_file


def test_a_line_longer_than_a_file_is_written_whole(tmp_path: Path) -> None:
    """A limit never loses a record: it gets a file of its own."""
    lines = RotatingLines(tmp_path / "audit", "ingress-0", 250, 3)
    for number, n_bytes in enumerate((100, 1000, 100)):
        lines.append(line(number, n_bytes))
    assert [path.stat().st_size for path in newest_first(tmp_path / "audit")] == [100, 1000, 100]


def test_files_and_folder_are_the_users_alone(tmp_path: Path) -> None:
    """Whatever the umask, and whatever mode a file that is there has."""
    before = os.umask(0)
    try:
        RotatingLines(tmp_path / "new" / "audit", "ingress-0", 1000, 2).append(line(1))
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "audit"
    assert folder.stat().st_mode & 0o777 == 0o700
    path = folder / "ingress-0.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    RotatingLines(folder, "ingress-0", 1000, 2).append(line(2))
    assert path.stat().st_mode & 0o777 == 0o600
    assert numbers(folder) == [1, 2]


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    """Whose mode is wider than 0700, or that is a symlink: nothing is written there."""
    wide = tmp_path / "wide"
    wide.mkdir()
    wide.chmod(0o755)
    with pytest.raises(PermissionError, match="mode 755, chmod it to 700"):
        RotatingLines(wide, "ingress-0", 1000, 2).append(line(1))
    wide.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(wide)
    with pytest.raises(PermissionError, match="no folder of this user"):
        RotatingLines(link, "ingress-0", 1000, 2).append(line(1))
    assert list(wide.iterdir()) == []


def test_what_is_no_file_of_ours_is_not_written_to(tmp_path: Path) -> None:
    """A symlink in the file's place is not followed, and a pipe does not hold the writer up."""
    folder = tmp_path / "audit"
    folder.mkdir(mode=0o700)
    path, target = folder / "ingress-0.jsonl", tmp_path / "target"
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        RotatingLines(folder, "ingress-0", 1000, 2).append(line(1))
    assert not target.exists()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(PermissionError, match="no file of this user"):
        RotatingLines(folder, "ingress-0", 1000, 2).append(line(1))


def test_half_a_line_of_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A writer that was killed leaves a beginning; the next line stands on its own."""
    lines = RotatingLines(tmp_path / "audit", "ingress-0", 1000, 2)
    lines.append(line(1))
    path = tmp_path / "audit" / "ingress-0.jsonl"
    with path.open("ab") as file:
        file.write(b"torn")
    RotatingLines(tmp_path / "audit", "ingress-0", 1000, 2).append(line(2))
    assert list(lines_of(path)) == [line(1), b"torn\n", line(2)]


_LIMITED = """
import resource, sys
from pathlib import Path
from router.rotation import RotatingLines
lines = RotatingLines(Path(sys.argv[1]), "ingress-0", 10_000, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
for number in range(4):
    try:
        lines.append(f"{number:099d}\\n".encode())
        print("written")
    except OSError as error:
        print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.append(f"{9:099d}\\n".encode())
"""


def test_a_file_that_cannot_grow_loses_lines_and_goes_on(tmp_path: Path) -> None:
    """With room for two lines and a half: the third is told as half written, the fourth as not
    written, and once there is room the next one is whole."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "audit")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    told = done.stdout.splitlines()
    assert told == ["written", "written", "half a line was written", "File too large"]
    half = f"{2:099d}"[:50].encode()
    expected = [line(0), line(1), half + b"\n", line(9)]
    assert list(lines_of(tmp_path / "audit" / "ingress-0.jsonl")) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_loses_lines_and_goes_on(tmp_path: Path) -> None:
    """On a file system of 16 KiB: writing fails, nothing grows, and what is freed is used."""
    mounted = tmp_path / "full"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "audit-test", str(mounted)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (mounted / "other").write_bytes(b"x" * 8192)
        lines = RotatingLines(mounted, "ingress-0", 1_000_000, 2)
        with pytest.raises(OSError, match=r"half a line|No space left"):
            append_all(lines, range(1000))
        with pytest.raises(OSError, match="No space left"):
            lines.append(line(1000))
        (mounted / "other").unlink()
        lines.append(line(2000))
        lines.close()
        whole = [each for each in lines_of(mounted / "ingress-0.jsonl") if len(each) == 100]
        assert whole[-1] == line(2000)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_file_that_was_taken_away_is_made_anew(tmp_path: Path) -> None:
    """Somebody else's rotation, or a clean-up, of the file or of the whole folder."""
    folder = tmp_path / "audit"
    lines = RotatingLines(folder, "ingress-0", 1000, 2)
    lines.append(line(1))
    (folder / "ingress-0.jsonl").rename(tmp_path / "kept")
    lines.append(line(2))
    assert numbers(folder) == [2]
    (folder / "ingress-0.jsonl").unlink()
    folder.rmdir()
    lines.append(line(3))
    assert numbers(folder) == [3]


def test_two_writers_of_one_name_lose_nothing(tmp_path: Path) -> None:
    """While an ingress drains its successor may have its name already."""
    folder = tmp_path / "audit"
    both = [RotatingLines(folder, "ingress-0", 500, 100) for _ in range(2)]
    for number in range(40):
        both[number % 2].append(line(number))
    assert sorted(numbers(folder)) == list(range(40))


def test_fewer_files_than_before_remove_the_others(tmp_path: Path) -> None:
    """A smaller limit holds from the next change of files on; other writers' files stay."""
    folder = tmp_path / "audit"
    for name, files in (("ingress-0", 9), ("ingress-10", 9), ("ingress-0", 2)):
        lines = RotatingLines(folder, name, 100, files)
        for number in range(9):
            lines.append(line(number))
    found = {path.name for path in folder.iterdir()}
    assert {name for name in found if name.startswith("ingress-0.")} == {
        "ingress-0.jsonl",
        "ingress-0.1.jsonl",
    }
    assert len(found) == 2 + 9


def test_other_files_of_a_folder_are_no_audit(tmp_path: Path) -> None:
    """Files are found from the newest to the oldest; a file is itself."""
    for name in ("a.jsonl", "a.1.jsonl", "a.10.jsonl", "a.2.jsonl", "b.jsonl", "a.txt", ".jsonl"):
        (tmp_path / name).write_text("1\n")
    found = [path.name for path in newest_first(tmp_path)]
    assert found == ["a.jsonl", "a.1.jsonl", "a.2.jsonl", "a.10.jsonl", "b.jsonl"]
    assert newest_first(tmp_path / "a.txt") == [tmp_path / "a.txt"]
