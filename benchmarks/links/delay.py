"""Carries packets between two TUN devices, each so many seconds late.

`delay.py SECONDS DEVICE A B`: A and B are files of network namespaces, in which it makes the device
of this name. Packets are few and large, so that carrying them costs little of the cores on which
others are measured. It needs the standard library alone and prints `up` once packets pass.
"""

import collections
import ctypes
import fcntl
import os
import struct
import subprocess
import sys
import threading
import time

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU_BYTES = 65_000
# Packets that the kernel keeps for us: more than a second of a gigabit.
_QUEUE_PACKETS = 10_000
_libc = ctypes.CDLL(None, use_errno=True)


def open_tun(namespace: str, device: str) -> int:
    """A TUN device in a namespace; the file that its packets are read from and written to."""
    # For this thread alone, which goes on to the next namespace afterwards.
    with open(namespace) as network:
        if _libc.setns(network.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    words = ["mtu", str(_MTU_BYTES), "txqueuelen", str(_QUEUE_PACKETS)]
    subprocess.run(["ip", "link", "set", device, *words], check=True)
    return tun


def carry(source: int, target: int, delay_s: float) -> None:
    """Start the two threads of one direction."""
    packets: collections.deque[tuple[float, bytes]] = collections.deque()
    waiting = threading.Semaphore(0)

    def read() -> None:
        while True:
            packet = os.read(source, _MTU_BYTES + 1)
            packets.append((time.monotonic() + delay_s, packet))
            waiting.release()

    def write() -> None:
        while True:
            waiting.acquire()
            due_s, packet = packets.popleft()
            time.sleep(max(0.0, due_s - time.monotonic()))
            try:
                os.write(target, packet)
            except OSError:  # the device is down: packets are lost as on a wire
                continue

    for job in (read, write):
        threading.Thread(target=job, daemon=True).start()


def main() -> None:
    delay_s, device = float(sys.argv[1]), sys.argv[2]
    a, b = (open_tun(namespace, device) for namespace in sys.argv[3:5])
    carry(a, b, delay_s)
    carry(b, a, delay_s)
    print("up", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
