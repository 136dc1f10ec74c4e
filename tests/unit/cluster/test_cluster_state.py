"""What `down` and `doctor` know of a cluster that is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import local_ray, state


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path / "cache"))


def test_a_live_supervisor_is_found_and_a_reused_pid_is_not(tmp_path: Path) -> None:
    """State names a process by pid and start time; another process with the pid is not it."""
    written = state.write(tmp_path, "http://127.0.0.1:1")
    assert state.read() == written
    supervisor = written.supervisor()
    assert supervisor is not None
    assert supervisor.pid == os.getpid()
    other = state.State(
        pid=written.pid, created_s=written.created_s - 100, run_dir="", url="", started_at=0
    )
    assert other.supervisor() is None
    state.clear()
    assert state.read() is None


def test_torn_state_is_no_state(tmp_path: Path) -> None:
    """A file that a crash left half written is ignored."""
    state.write(tmp_path, "http://127.0.0.1:1")
    state.state_file().write_bytes(b'{"pid": 1')
    assert state.read() is None


def test_sweep_removes_host_tiers_of_this_run_alone(tmp_path: Path) -> None:
    """An engine that died while it started leaves one by its run folder's name."""
    run_dir = tmp_path / "breakeven-abc"
    run_dir.mkdir()
    mine, other = (Path(f"/dev/shm/vllm_offload_{name}-1.mmap") for name in (run_dir.name, "other"))
    try:
        for path in (mine, other):
            path.write_bytes(b"x")
        local_ray.sweep(run_dir, keep_logs=False)
        assert not mine.exists()
        assert other.exists()
    finally:
        other.unlink(missing_ok=True)
        mine.unlink(missing_ok=True)


def test_sweep_ends_exactly_the_processes_of_a_run_folder(tmp_path: Path) -> None:
    """A process with a file open in the run folder is ended, another is not."""
    run_dir, other_dir = tmp_path / "run", tmp_path / "other"
    script = "import sys,time; f=open(sys.argv[1],'w'); print('up',flush=True); time.sleep(60)"
    started = []
    for folder in (run_dir, other_dir):
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder / "log")], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
    ours, theirs = started
    try:
        assert local_ray.sweep(run_dir, keep_logs=False) == 1
        assert ours.poll() is not None
        assert theirs.poll() is None
        assert not run_dir.exists()
    finally:
        theirs.kill()
        theirs.wait(5)
