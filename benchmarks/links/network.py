"""Two network namespaces of this machine and a link between them, shaped as a slow network is.

A rate is a token bucket (`tc tbf`) on both ends of a veth pair. Plain kernels have no netem, so a
delay is a TUN pair whose packets a process of ours holds back (`benchmarks.links.delay`). Nothing
outside of the namespaces is touched: both ends are made inside them.

Names of namespaces carry the process that made them. What a crash has left is cleared away before
the next are made.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_TOOLS = ("ip", "tc", "nsenter", "unshare")
# Who is root there may make networks, though not touch the machine's; /run is where they get names.
_ROOTLESS = (
    "unshare --user --map-root-user --mount --net "
    'sh -c \'mount -t tmpfs tmpfs /run && exec "$0" "$@"\' COMMAND'
)
_PREFIX = "breakeven-link"
_RUN = Path("/run/netns")
_DEVICE = "wire"
# Of a namespace alone: no other network hears of them.
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Room for the largest packet that the kernel hands to a device in one piece.
_LEAST_BURST_BYTES = 65_536
# A bucket holds what passes in so long: short enough that a transfer does not ride on it.
_BURST_S = 0.002
_QUEUE_MS = 50
_UP_S = 10.0
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
# Of the links that this process has made.
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class LinkRefusedError(RuntimeError):
    """This machine cannot make namespaces; says what is missing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a link lets through: bits a second in each direction (None: whatever comes), and
    seconds that each packet takes on its way, beside the time that the rate costs."""

    bits_per_s: float | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class End:
    """One side of a link: the namespace's name, its address, and its device there."""

    namespace: str
    address: str
    device: str = _DEVICE


@dataclass(frozen=True, slots=True)
class Link:
    """Both ends; their delay is settled, their rate may change while it is used."""

    ends: tuple[End, End]

    def limit(self, bits_per_s: float | None) -> None:
        """Another rate from now on, in both directions; None for none."""
        for end in self.ends:
            _limit(end, bits_per_s)


def check(delays: bool = True) -> None:
    """Raise `LinkRefusedError` where this machine cannot make a link, or none with a delay."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise LinkRefusedError(f"links want {', '.join(missing)}: install iproute2 and util-linux")
    if os.geteuid() != 0:
        raise LinkRefusedError(f"links want root, or a user namespace of their own: {_ROOTLESS}")
    if delays and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise LinkRefusedError("delays want /dev/net/tun: load the tun module, or let us open it")
    name = f"{_own()}-try"
    _ip("netns", "add", name)
    _ip("netns", "delete", name)


@contextlib.contextmanager
def joined(shape: Shape) -> Iterator[Link]:
    """Two namespaces and the link between them, until the block ends. Raises `LinkRefusedError`
    where that cannot be had."""
    check(delays=shape.delay_s > 0.0)
    clear_stale()
    name = f"{_own()}-{next(_numbers)}"
    a, b = (End(f"{name}{side}", address) for side, address in zip("ab", _ADDRESSES, strict=True))
    with contextlib.ExitStack() as made:
        for end in (a, b):
            _ip("netns", "add", end.namespace)
            made.callback(remove, end.namespace)
            _ip("-n", end.namespace, "link", "set", "lo", "up")
        if shape.delay_s:
            made.enter_context(_delayed(a, b, shape.delay_s))
        else:
            near, far = (("netns", end.namespace) for end in (a, b))
            _ip("link", "add", _DEVICE, *near, "type", "veth", "peer", "name", _DEVICE, *far)
        for end in (a, b):
            _ip("-n", end.namespace, "address", "add", f"{end.address}/24", "dev", end.device)
            _ip("-n", end.namespace, "link", "set", end.device, "up")
        link = Link((a, b))
        link.limit(shape.bits_per_s)
        yield link


def remove(namespace: str) -> None:
    """End every process in a namespace of ours, and the namespace."""
    assert namespace.startswith(_PREFIX), namespace
    with contextlib.suppress(LinkRefusedError):
        inside = [int(pid) for pid in _ip("netns", "pids", namespace).split()]
        _end([pid for pid in inside if pid != os.getpid()])
    with contextlib.suppress(LinkRefusedError):
        _ip("netns", "delete", namespace)


def clear_stale() -> list[str]:
    """Remove what processes that are gone have left; returns the names."""
    found = sorted(_RUN.glob(f"{_PREFIX}-*")) if _RUN.is_dir() else []
    stale = [path.name for path in found if not _is_owned(path.name)]
    for name in stale:
        remove(name)
    return stale


@contextlib.contextmanager
def entered(end: End) -> Iterator[None]:
    """Sockets that this thread opens meanwhile are of the namespace."""
    with open("/proc/thread-self/ns/net") as own, (_RUN / end.namespace).open() as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def die_with_parent() -> None:
    """For `subprocess`' preexec_fn: the child is killed when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def first_line(process: "subprocess.Popen[bytes]") -> bytes:
    """What a process says first; it is killed if that takes too long, which ends the line."""
    assert process.stdout is not None
    late = threading.Timer(_UP_S, process.kill)
    late.start()
    with process.stdout as said:
        line = said.readline()
    late.cancel()
    return line


# ------------------------------------------------------------------ parts


def _limit(end: End, bits_per_s: float | None) -> None:
    # What waits is dropped, and sent again. Changed in place, a packet that waits for more tokens
    # than the new burst has would stop the device for ever (Linux 6.18).
    with contextlib.suppress(LinkRefusedError):  # there was none
        _tc(end, "qdisc", "delete", "dev", end.device, "root")
    if bits_per_s is None:
        return
    burst = max(_LEAST_BURST_BYTES, round(bits_per_s / 8 * _BURST_S))
    rate = ("rate", f"{round(bits_per_s)}bit", "burst", str(burst), "latency", f"{_QUEUE_MS}ms")
    _tc(end, "qdisc", "add", "dev", end.device, "root", "tbf", *rate)


@contextlib.contextmanager
def _delayed(a: End, b: End, delay_s: float) -> Iterator[None]:
    """A TUN device in each namespace, and the process that carries packets between them."""
    words = [sys.executable, str(Path(__file__).with_name("delay.py")), str(delay_s), _DEVICE]
    process = subprocess.Popen(
        [*words, *(str(_RUN / end.namespace) for end in (a, b))],
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    try:
        said = first_line(process)
        if said != b"up\n":
            raise LinkRefusedError("the delay's TUN devices did not come up; its words are above")
        yield
    finally:
        process.kill()
        process.wait()


def _enter(network: int) -> None:
    if _libc.setns(network, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _own() -> str:
    """What names of this process's namespaces begin with."""
    me = psutil.Process()
    return f"{_PREFIX}-{me.pid}-{round(me.create_time() * 100)}"


def _is_owned(name: str) -> bool:
    """Whether the process that made it lives; pids are used again."""
    pid, _, rest = name.removeprefix(f"{_PREFIX}-").partition("-")
    try:
        began = psutil.Process(int(pid)).create_time()
        return abs(began * 100 - int(rest.partition("-")[0])) < 200
    except (ValueError, psutil.NoSuchProcess):
        return False


def _end(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            processes[-1].kill()
    psutil.wait_procs(processes, timeout=_UP_S)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _tc(end: End, *words: str) -> str:
    return _run("tc", "-n", end.namespace, *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LinkRefusedError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout
