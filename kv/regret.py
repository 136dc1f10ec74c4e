"""How often blocks that were evicted are asked for again: what displacing cached blocks costs.

A ghost is the key of a block that left the paged KV. As many are remembered as blocks are held, the
last ones, so that the share of ghosts that are asked for before they are forgotten is the chance
that what is displaced now would have been a hit, had it stayed for once its time. (Ghost lists are
ARC's; N. Megiddo, D. Modha, FAST 2003.)
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

# Ghosts that are remembered; where more would be, only every second, fourth... key is followed,
# chosen by its own bits.
MAX_GHOSTS = 16_384
# Ghosts that one call goes through at least, and at most so many for each key that it brings: all
# at once would take 40 ms, in which nobody is told what is cached where.
STEP, A_KEY = 256, 4
# Ghosts whose fate is known weigh in until so many others are; fewer than some are no evidence.
_FADES_AFTER, _PRIOR = 8192.0, 64.0
_ALL = 1 << 64


class Regret:
    """Follows what leaves the paged KV of a cluster, and what is asked for."""

    def __init__(self, max_ghosts: int = MAX_GHOSTS) -> None:
        self._max_ghosts = max_ghosts
        # Both oldest first, and all of the first are older: those that were there when fewer keys
        # began to be followed, and have yet to be gone through for it.
        self._unsifted: OrderedDict[bytes, None] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._below = _ALL  # keys whose first 64 bits are below are followed
        self._asked = self._known = 0.0

    def __len__(self) -> int:
        """Ghosts that are remembered."""
        return len(self._unsifted) + len(self._ghosts)

    @property
    def chance(self) -> float:
        """That a block which is displaced now is asked for again; 0 without evidence."""
        return self._asked / (self._known + _PRIOR)

    def evicted(self, keys: Collection[bytes], held_blocks: int) -> None:
        """These left a replica's paged KV; so many blocks are in the paged KV of all."""
        steps = max(STEP, A_KEY * len(keys))
        for key in keys:
            if self._follows(key):
                self._unsifted.pop(key, None)
                self._ghosts[key] = None
                self._ghosts.move_to_end(key)
        if self._unsifted:
            self._sift(steps)
        elif len(self._ghosts) > self._max_ghosts:
            self._below >>= 1
            self._unsifted, self._ghosts = self._ghosts, OrderedDict()
            # What is counted from here on comes from half as many keys.
            self._asked, self._known = self._asked / 2.0, self._known / 2.0
        else:
            self._forget(min(steps, len(self) - int(held_blocks * (self._below / _ALL))))

    def asked(self, keys: Sequence[bytes], depth: int) -> None:
        """A prompt of these blocks has come, the first `depth` of which some paged KV still has."""
        if not len(self):
            return
        for at, key in enumerate(keys):
            was_there = self._remove(key)
            if was_there and at >= depth and self._follows(key):
                self._fade(1)
                self._asked += 1.0

    def _remove(self, key: bytes) -> bool:
        for ghosts in (self._ghosts, self._unsifted):
            if key in ghosts:
                del ghosts[key]
                return True
        return False

    def _follows(self, key: bytes) -> bool:
        return self._below == _ALL or int.from_bytes(key[:8], "big") < self._below

    def _sift(self, steps: int) -> None:
        """Take some over, the newest first: they come before what is there."""
        for _ in range(min(steps, len(self._unsifted))):
            key, _ = self._unsifted.popitem()
            if self._follows(key):
                self._ghosts[key] = None
                self._ghosts.move_to_end(key, last=False)

    def _forget(self, over: int) -> None:
        """Drop the oldest: nobody has asked for them in their time."""
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
