"""Where the files beside the packages are: in a checkout, or installed from a wheel."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_INSTALLED = Path(sys.prefix) / "share" / "breakeven"
IN_CHECKOUT = (ROOT / "configs" / "cpu.yaml").exists()
HOME = ROOT if IN_CHECKOUT else _INSTALLED


def default_cache() -> Path:
    """Beside the code in a checkout, else where a user's caches are."""
    return ROOT / ".cache" if IN_CHECKOUT else Path.home() / ".cache" / "breakeven"
