"""A vault's client that reads all the time, over TCP: `reading_process.py ADDRESS TIMEOUT_S`.

Says for each get how many blocks came and how long it took, and ends at the first wrong byte.
"""

import sys
import time

from tests.vault.blocks import frames, get, stored
from tests.vault.shard_process import FINGERPRINT, MIB, SECRET
from workers.vault import keys
from workers.vault.client import ShardSeat, VaultClient

BLOCKS, BLOCK_BYTES = 24, MIB


def main() -> None:
    seats = {"vault-0": ShardSeat(sys.argv[1])}
    vault = VaultClient(seats, keys.client_keys(SECRET), FINGERPRINT)
    timeout_s, blocks = float(sys.argv[2]), frames(BLOCKS, BLOCK_BYTES)
    assert vault.await_up(20.0)
    assert stored(vault, blocks)
    while True:
        begun = time.monotonic()
        found = get(vault, list(blocks), timeout_s)
        took_s = time.monotonic() - begun
        assert all(blocks[key] == frame for key, frame in found.items())
        print(">", len(found), took_s, flush=True)
        time.sleep(0.001)


if __name__ == "__main__":
    main()
