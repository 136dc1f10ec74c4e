"""One side of a NIXL read: `moving_process.py give|take HOST BYTES FILE`.

The giver writes its agent's metadata to FILE and stays until it is killed. The taker reads all
bytes once, since the first read connects, and then four times, and prints the least seconds of
these, so that a busy machine does not count, and UCX's lanes.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from workers import connector, lanes

SEED = bytes(range(256))
TIMEOUT_S = 60.0


def main() -> None:
    role, host, n_bytes, told = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    with TemporaryDirectory() as folder:
        log = Path(folder) / "ucx.log"
        connector.prepare(host, log, "tcp")
        # Loads UCX, which reads what `prepare` has set.
        from workers.vault.region import READ, Piece, Region

        region = Region(n_bytes, serves=role == "give")
        if role == "give":
            region.memory[:] = SEED * (n_bytes // len(SEED))
            draft = told.with_suffix(".draft")
            draft.write_bytes(region.base.to_bytes(8, "big") + region.metadata)
            draft.rename(told)
            time.sleep(TIMEOUT_S)
            return
        known = told.read_bytes()
        peer, base = region.meet(known[8:]), int.from_bytes(known[:8], "big")
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            until_s = began + TIMEOUT_S
            region.move(READ, peer, [Piece(0, base, n_bytes)], lambda s=until_s: _over(s))
            seconds.append(time.monotonic() - began)
        assert region.memory[-256:] == SEED
        print(min(seconds[1:]), *lanes.read(log))


def _over(until_s: float) -> bool:
    return time.monotonic() >= until_s


if __name__ == "__main__":
    main()
