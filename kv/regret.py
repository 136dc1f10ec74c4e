"""How often blocks that were evicted are asked for again: what displacing cached blocks costs.

A ghost is the key of a block that left the paged KV. As many are remembered as blocks are held, the
last ones, so that the share of ghosts that are asked for before they are forgotten is the chance
that what is displaced now would have been a hit, had it stayed for once its time. (Ghost lists are
ARC's; N. Megiddo, D. Modha, FAST 2003.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# Ghosts that are remembered; where more would be, only every second, fourth... key is followed,
# chosen by its own bits.
MAX_GHOSTS = 65_536
# Ghosts whose fate is known weigh in until so many others are; fewer than some are no evidence.
_FADES_AFTER, _PRIOR = 8192.0, 64.0
_ALL = 1 << 64


class Regret:
    """Follows what leaves the paged KV of a cluster, and what is asked for."""

    def __init__(self, max_ghosts: int = MAX_GHOSTS) -> None:
        self._max_ghosts = max_ghosts
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()  # oldest first
        self._below = _ALL  # keys whose first 64 bits are below are followed
        self._asked = self._known = 0.0

    @property
    def chance(self) -> float:
        """That a block which is displaced now is asked for again; 0 without evidence."""
        return self._asked / (self._known + _PRIOR)

    def evicted(self, keys: Iterable[bytes], held_blocks: int) -> None:
        """These left a replica's paged KV; so many blocks are in the paged KV of all."""
        ghosts = self._ghosts
        for key in self._followed(keys):
            ghosts[key] = None
            ghosts.move_to_end(key)
        while len(ghosts) > self._max_ghosts:
            self._below >>= 1
            self._ghosts = ghosts = OrderedDict.fromkeys(self._followed(ghosts))
            # What is counted from here on comes from half as many keys.
            self._asked, self._known = self._asked / 2.0, self._known / 2.0
        self._forget(len(ghosts) - int(held_blocks * (self._below / _ALL)))

    def asked(self, keys: Sequence[bytes], depth: int) -> None:
        """A prompt of these blocks has come, the first `depth` of which some paged KV still has."""
        ghosts = self._ghosts
        if not ghosts:
            return
        for at, key in enumerate(keys):
            if key in ghosts:
                del ghosts[key]
                if at >= depth:
                    self._fade(1)
                    self._asked += 1.0

    def _followed(self, keys: Iterable[bytes]) -> Iterable[bytes]:
        if self._below == _ALL:
            return keys
        return [key for key in keys if int.from_bytes(key[:8], "big") < self._below]

    def _forget(self, over: int) -> None:
        """Drop the oldest: nobody has asked for them in their time."""
        over = min(over, len(self._ghosts))
        for _ in range(over):
            self._ghosts.popitem(last=False)
        if over > 0:
            self._fade(over)

    def _fade(self, fates: int) -> None:
        """So many more are known. What was known before weighs less, and the sum of all such
        weights is the geometric series of these."""
        kept = (1.0 - 1.0 / _FADES_AFTER) ** fates
        self._asked *= kept
        self._known = kept * self._known + (1.0 - kept) * _FADES_AFTER
