"""A process that stores blocks until it is killed, and says which ones it has acknowledged.

Arguments: folder, first block, budget and segment bytes. Half of the older blocks are deleted as
it goes, so that compactions are under way too.
"""

import sys
from pathlib import Path

# Run as a program: the packages are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from kv.tiers.segments import SegmentStore
from tests.unit.kv.vault_blocks import key_of, payload_of

KEPT = 40


def main() -> None:
    folder, first, budget_bytes, segment_bytes = sys.argv[1:]
    store = SegmentStore(Path(folder), int(budget_bytes), int(segment_bytes))
    at = int(first)
    while True:
        for number in range(at, at + 5):
            store.append(key_of(number), b"note", payload_of(number))
        for key in store.commit():
            print("stored", key.hex(), flush=True)
        gone = [key_of(number) for number in range(at - KEPT, at - KEPT + 5) if number % 2]
        for key in gone:
            # Told first: from now on it may be there or not.
            print("deleting", key.hex(), flush=True)
        store.delete(gone)
        at += 5


if __name__ == "__main__":
    main()
