"""Shaped links: their rate, their delay, what crosses them, and what a crash leaves."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.links import network
from benchmarks.links.network import Link, Shape, clear_stale, joined
from benchmarks.links.node import inner, node
from benchmarks.result import ROOT
from tests.waiting import await_that

MBIT = 1e6
# Of what a device carries, TCP's data are 1,448 bytes of each 1,514.
TCP_SHARE = 1448 / 1514


@contextlib.contextmanager
def _connected(link: Link) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from the first end to the second."""
    a, b = link.ends
    with network.entered(b):
        listener = socket.create_server((b.address, 0))
    with listener, network.entered(a):
        sender = socket.create_connection(listener.getsockname(), timeout=10)
        taker, _ = listener.accept()
        with sender, taker:
            for end in (sender, taker):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sender, taker


def _bits_per_s(link: Link, seconds: float) -> float:
    """What a stream carries in so many seconds, its first third left out."""
    with _connected(link) as (sender, taker):
        over = threading.Event()
        writing = threading.Thread(target=_write, args=(sender, over))
        writing.start()
        began, taken, counted_from = time.monotonic(), 0, 0.0
        while (now := time.monotonic()) < began + seconds:
            n_bytes = len(taker.recv(1 << 20))
            if now > began + seconds / 3:
                counted_from = counted_from or now
                taken += n_bytes
        over.set()
        taker.shutdown(socket.SHUT_RDWR)
        writing.join()
    return 8 * taken / (now - counted_from)


def _write(sender: socket.socket, over: threading.Event) -> None:
    data = bytes(1 << 18)
    with contextlib.suppress(OSError):
        while not over.is_set():
            sender.send(data)


def _most_bits_per_s(link: Link, seconds: float = 1.5) -> float:
    """The most of some, so that a busy machine does not count."""
    return max(_bits_per_s(link, seconds) for _ in range(4))


def _round_trip_s(link: Link) -> float:
    """The least of some, so that a busy machine does not count."""
    with _connected(link) as (sender, taker):
        found = []
        for _ in range(15):
            began = time.perf_counter()
            for source, target in ((sender, taker), (taker, sender)):
                source.send(b"!")
                assert target.recv(1) == b"!"
            found.append(time.perf_counter() - began)
        return min(found)


@pytest.mark.parametrize("mbit", [50, 200, 1000])
def test_a_rate_is_what_it_says(mbit: int) -> None:
    """A stream over the link carries the rate that was set, and another one once it is changed."""
    with joined(Shape(mbit * MBIT)) as link:
        found = _most_bits_per_s(link)
        assert found == pytest.approx(mbit * MBIT * TCP_SHARE, rel=0.12)
        link.limit(mbit * MBIT / 4)
        assert _most_bits_per_s(link) == pytest.approx(mbit * MBIT / 4 * TCP_SHARE, rel=0.12)


def test_a_rate_may_change_under_traffic() -> None:
    """What waits as the link becomes slower does not stop it."""
    with joined(Shape(1000 * MBIT)) as link, _connected(link) as (sender, taker):
        over = threading.Event()
        writing = threading.Thread(target=_write, args=(sender, over))
        writing.start()
        for mbit in (1000, 100, 1000, 50):
            link.limit(mbit * MBIT)
            taken, until = 0, time.monotonic() + 1.0
            while time.monotonic() < until:
                taken += len(taker.recv(1 << 20))
            assert 8 * taken > 0.7 * mbit * MBIT
        over.set()
        taker.shutdown(socket.SHUT_RDWR)
        writing.join()


def test_a_delay_is_taken_each_way() -> None:
    """Twice for a question and its answer; without one the link takes under a millisecond. A
    rate holds beside it."""
    with joined(Shape()) as link:
        assert _round_trip_s(link) < 0.001
    with joined(Shape(200 * MBIT, delay_s=0.01)) as link:
        assert 0.02 <= _round_trip_s(link) < 0.023
        assert _most_bits_per_s(link, 3.0) == pytest.approx(200 * MBIT, rel=0.12)


def test_a_node_has_its_own_memory_and_processes(tmp_path: Path) -> None:
    """Shared memory, process ids and addresses of one node are not there on the other."""
    with joined(Shape()) as link, node(link.ends[0]) as a, node(link.ends[1]) as b:
        assert a.run(["touch", "/dev/shm/of-a"]).returncode == 0
        assert a.run(["ls", "/dev/shm"]).stdout == "of-a\n"
        assert b.run(["ls", "/dev/shm"]).stdout == ""
        assert not Path("/dev/shm/of-a").exists()
        sleeping = a.start(["sleep", "60"], tmp_path / "log")
        await_that(lambda: "sleep" in a.run(["ps", "-e"]).stdout, "it runs", 5.0)
        assert "sleep" not in b.run(["ps", "-e"]).stdout
        assert link.ends[1].address in b.run(["ip", "address"]).stdout
        assert a.run(["pwd"]).stdout.strip() == str(ROOT)
        [one] = [inner(sleeping)]
    assert not one.is_running()
    assert sleeping.wait(5) != 0


def test_a_killed_owner_leaves_no_process_and_its_names_are_cleared(tmp_path: Path) -> None:
    """The kernel ends what ran on the nodes, and the next owner removes the namespaces. Those of an
    owner that lives stay."""
    program = (
        "import pathlib, sys, time\n"
        "from benchmarks.links.network import Shape, joined\n"
        "from benchmarks.links.node import node\n"
        "with joined(Shape(delay_s=0.001)) as link, node(link.ends[0]) as a:\n"
        "    a.start(['sleep', '61.5'], pathlib.Path(sys.argv[1]))\n"
        "    print(link.ends[0].namespace, flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        name = owner.stdout.readline().strip()
    await_that(lambda: len(_sleeping()) > 0, "it runs", 5.0)
    with joined(Shape()) as link:
        assert name not in clear_stale()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        await_that(lambda: not _sleeping(), "nothing runs there any more", 5.0)
        assert name in clear_stale()
        assert not Path(f"/run/netns/{name}").exists()
        assert Path(f"/run/netns/{link.ends[0].namespace}").exists()
    assert not Path(f"/run/netns/{link.ends[0].namespace}").exists()


def _sleeping() -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-2:] == ["sleep", "61.5"]:
                found.append(process.pid)
    return found


def test_links_do_without_the_machine_s_root() -> None:
    """As the refusal says: in a user namespace of one's own, without power over the machine."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    if subprocess.run([*words, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make user namespaces")
    program = (
        "from benchmarks.links.network import Shape, joined\n"
        "from benchmarks.links.node import node\n"
        "with joined(Shape(1e8)) as link, node(link.ends[0]) as a:\n"
        "    print(a.run(['ip', 'address']).stdout)\n"
    )
    script = 'mount -t tmpfs tmpfs /run && exec "$0" "$@"'
    done = subprocess.run(
        [*words, "sh", "-c", script, sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "inet 10.77.0.1/24" in done.stdout, done.stderr


@pytest.mark.parametrize("mbit", [200, 1000])
def test_nixl_uses_the_link(tmp_path: Path, mbit: int) -> None:
    """Bytes that NIXL reads from the other node take the link's time, over the lane of TCP on its
    device: neither shared memory nor another network."""
    n_bytes = 16 << 20
    program = [sys.executable, "-m", "tests.links.moving_process"]
    with joined(Shape(mbit * MBIT)) as link, node(link.ends[0]) as a, node(link.ends[1]) as b:
        told = tmp_path / "metadata"
        giving = [*program, "give", a.address, str(n_bytes), str(told)]
        giver = a.start(giving, tmp_path / "giver.log")
        await_that(lambda: told.exists() or giver.poll() is not None, "it gives", 30.0)
        assert giver.poll() is None, (tmp_path / "giver.log").read_text()
        done = b.run([*program, "take", b.address, str(n_bytes), str(told)])
        assert done.returncode == 0, done.stderr
        # NIXL says on the lines before that it is there.
        seconds, *lanes = done.stdout.splitlines()[-1].split()
    assert lanes == ["tcp/wire"]
    assert 8 * n_bytes / float(seconds) == pytest.approx(mbit * MBIT * TCP_SHARE, rel=0.15)
