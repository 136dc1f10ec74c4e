"""Make the anchor's virtual environment; do nothing where it is in place.

It holds the locked set of our own (requirements/cpu.txt), so that both systems run the same vLLM,
Ray, NIXL and torch, and what Ray Serve LLM imports besides (requirements.txt in this folder).
Ray 2.60's own extra asks for vLLM 0.29 and NIXL 1.3.2.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402
from steps import locked  # noqa: E402

LOCKS = (ROOT / "requirements" / "cpu.txt", HERE / "requirements.txt")
# pyarrow and pandas.
bootstrap.NEEDED_BYTES["requirements"] = 500_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    venv = parser.parse_args().venv.absolute()
    venv.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(venv.parent / "anchor.lock"):
            for lock in LOCKS:
                stamp = venv / f".stamp-{lock.stem}-{bootstrap.digest(lock)}"
                if not stamp.exists():
                    bootstrap.install(venv, lock, stamp)
    except bootstrap.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
