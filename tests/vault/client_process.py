"""A vault's client in a process of its own, to be killed or stopped: `client_process.py ADDRESS`.

Asks for room for one block, says so, and waits to be told to write it, then to say that it is in.
"""

import sys
import time

import zmq

from kv.vault import wire
from tests.unit.kv.vault_frames import frame_of
from tests.vault.shard_process import FINGERPRINT, MIB, SECRET
from workers.vault import keys
from workers.vault.line import Session
from workers.vault.region import WRITE

KEY, FRAME = b"of another process", frame_of(77, 200_000)


def main() -> None:
    session = Session(zmq.Context(), sys.argv[1], keys.client_keys(SECRET), FINGERPRINT, MIB)
    put = wire.Put(0, "tag", "raw", (wire.Offer(KEY, None, len(FRAME), 1.0),))
    granted = session.ask(put, wire.Granted, time.monotonic() + 10)
    print("> granted", flush=True)
    sys.stdin.readline()
    session.staging[: len(FRAME)] = FRAME
    extents = granted.verdicts[0].extents
    session.move(WRITE, [(0, extents)], time.monotonic() + 10)
    print("> written", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
