"""A lender in a process of its own: `lending_process.py ROWS ROW_BYTES` prints its address, and
lends row n, of bytes n + 1, by the key `key(n)`; it ends when its input does."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kv.loan import Loan
from workers import connector
from workers.peer.keys import peer_keys
from workers.peer.server import PeerServer

SECRET = b"of these peers".ljust(32)
FINGERPRINT = "0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]


def key(row: int) -> bytes:
    return b"key-%d" % row


class Rows:
    """A lender whose blocks are all there; it knows what it has lent."""

    def __init__(self, rows: int) -> None:
        self._rows = {key(row): row for row in range(rows)}
        self.out = 0

    def here(self, keys: Sequence[bytes]) -> tuple[bool, ...]:
        return tuple(name in self._rows for name in keys)

    def lend(self, keys: Sequence[bytes]) -> Loan:
        rows = tuple(self._rows.get(name) for name in keys)
        lent = tuple((name, None) for name, row in zip(keys, rows, strict=True) if row is not None)
        self.out += len(lent)
        return Loan(rows, lent)

    def give_back(self, loan: Loan) -> None:
        self.out -= len(loan.chunks)


def memory(rows: int, row_bytes: int) -> memoryview:
    """Rows that differ."""
    content = b"".join(bytes([(row + 1) % 256]) * row_bytes for row in range(rows))
    return memoryview(bytearray(content)).cast("B", (rows, row_bytes))


@contextlib.contextmanager
def lender(rows: int, row_bytes: int) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Its address and its process."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(rows), str(row_bytes)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("tcp://")).strip()
        yield address, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def main() -> None:
    connector.keep_on_network("127.0.0.1")
    rows, row_bytes = map(int, sys.argv[1:])
    keys = peer_keys(SECRET)
    server = PeerServer("127.0.0.1", keys.server, FINGERPRINT, Rows(rows), memory(rows, row_bytes))
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main()
