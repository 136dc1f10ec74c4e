"""The first process of a node: `first.py BYTES` gives it a /dev/shm of at most so many bytes.

It prints `up`, and takes in processes whose parents are gone, as a machine's first process does.
"""

import os
import subprocess
import sys
import time

_LOOK_S = 0.2


def main() -> None:
    size = f"size={int(sys.argv[1])}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", "/dev/shm"], check=True)
    print("up", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
