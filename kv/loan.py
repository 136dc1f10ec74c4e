"""A loan: blocks of a host tier that stay as they are while another replica reads them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Loan:
    """Pinned blocks: the row of each that was asked for, None for one that is not lent; and the
    books' own record of those that are, by key."""

    rows: tuple[int | None, ...]
    chunks: tuple[tuple[bytes, Any], ...]
