"""tierKV's side of `peers_tierkv.py`, run by the Python that has it: FOLDER, GROUP, REPEATS.

Encodes and decodes each block of FOLDER/blocks.npy, leaves FOLDER/decoded.npy, and prints the
speeds in bytes of fp32 a second of this thread's CPU time.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from tierkv_core import TurboQuant


def main() -> None:
    folder, group, repeats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    blocks = np.load(folder / "blocks.npy")
    pages = [block.tobytes() for block in blocks]
    codec = TurboQuant(group)
    decoded = [bytearray(len(page)) for page in pages]
    encode_s, decode_s = [], []
    # The first of each touches memory for the first time.
    for _ in range(repeats + 1):
        begun = time.thread_time()
        encoded = [bytes(codec.encode(page)) for page in pages]
        encode_s.append(time.thread_time() - begun)
        begun = time.thread_time()
        for frame, into in zip(encoded, decoded, strict=True):
            codec.decode_into(frame, into)
        decode_s.append(time.thread_time() - begun)
    back = [np.frombuffer(page, dtype=np.float32).reshape(blocks[0].shape) for page in decoded]
    np.save(folder / "decoded.npy", np.stack(back))
    told = {
        "encoded_bytes": len(encoded[0]),
        "encode_bytes_s": [blocks.nbytes / spent for spent in encode_s[1:]],
        "decode_bytes_s": [blocks.nbytes / spent for spent in decode_s[1:]],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
