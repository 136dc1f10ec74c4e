"""What taking blocks from a tier costs: a guess until it was done, then what was seen of late.

Fetching takes a moment whatever is fetched (the engine asks, waits for the copy, and goes on with a
later step) and then so many seconds a byte. The moment is a constant of the tier. The seconds a
byte begin as a guess, follow what the replica sees, and return to the guess as that grows old: a
tier that was slow once is not used while that is known, so nothing else would show that it is fast
again.
"""

from collections.abc import Mapping

from kv.catalogue import Tier
from kv.curve import LinkCurve

# Of a 2-core CPU machine, on the careful side: restores of 47 to 190 MB took 10 to 20 ms longer
# than device hits from host memory, and 0.2 to 0.4 s longer from files that were not cached.
GUESSES: Mapping[Tier, LinkCurve] = {
    Tier.HOST: LinkCurve(0.005, 5e-10),
    Tier.DISK: LinkCurve(0.015, 2e-9),
    Tier.PEER: LinkCurve(0.02, 1e-9),
    Tier.VAULT: LinkCurve(0.02, 2e-9),
}
# A guess weighs as much as having seen so many bytes.
_GUESS_BYTES = 16 * 2**20
# What was seen weighs half as much after so long.
_HALF_LIFE_S = 60.0
# One fetch counts at most so many times as slow as expected: a hiccup is no measure of a tier.
_MOST_SLOWER = 8.0


class FetchCost:
    """The curve of one tier. Times are seconds of any one clock."""

    def __init__(self, guess: LinkCurve, now_s: float) -> None:
        self._guess, self._at_s = guess, now_s
        self._seen_bytes = self._seen_s = 0.0

    def saw(self, n_bytes: int, seconds: float, now_s: float) -> None:
        """So many bytes came in so many seconds, the constant moment not counted."""
        if n_bytes <= 0 or seconds <= 0.0:
            return
        self._fade(now_s)
        most_s = _MOST_SLOWER * n_bytes * self._per_byte_s()
        self._seen_bytes += n_bytes
        self._seen_s += min(seconds, most_s)

    def curve(self, now_s: float) -> LinkCurve:
        """What it costs now. Two digits of it: it is told whenever it changes."""
        self._fade(now_s)
        return LinkCurve(self._guess.latency_s, float(f"{self._per_byte_s():.1e}"))

    def _per_byte_s(self) -> float:
        guessed_s = _GUESS_BYTES * self._guess.per_byte_s
        return (guessed_s + self._seen_s) / (_GUESS_BYTES + self._seen_bytes)

    def _fade(self, now_s: float) -> None:
        left: float = 0.5 ** (max(0.0, now_s - self._at_s) / _HALF_LIFE_S)
        self._seen_bytes *= left
        self._seen_s *= left
        self._at_s = now_s
