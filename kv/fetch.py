"""What taking blocks from a tier costs: a guess until it was done, then what was seen of late.

What counts is the time from asking for a request's blocks until it can go on, with the moment that
passes whatever is fetched. Where the engine computed other prompts meanwhile, that is the most that
the tier took; what copying alone took is the least.
"""

from collections.abc import Mapping

from kv.catalogue import Tier
from kv.curve import LinkCurve, TransferSample
from kv.live import RETRY_S, LiveLink

# Of a 2-core CPU machine, on the careful side: restores of 47 to 190 MB took 10 to 20 ms longer
# than device hits from host memory, and 0.2 to 0.4 s longer from files that were not cached.
GUESSES: Mapping[Tier, LinkCurve] = {
    Tier.HOST: LinkCurve(0.005, 5e-10),
    Tier.DISK: LinkCurve(0.015, 2e-9),
    Tier.PEER: LinkCurve(0.02, 1e-9),
    Tier.VAULT: LinkCurve(0.02, 2e-9),
}
# Of a prompt's blocks, by which curves of tiers are compared.
TYPICAL_BYTES = 16 * 2**20
# Fetches that are told one by one, to be shown.
_SHOWN = 16

Seen = tuple[tuple[int, float], ...]


class FetchCost:
    """The curve of one tier. Times are seconds of any one clock; `retry_s` is `kv.live`'s."""

    def __init__(self, guess: LinkCurve, retry_s: float | None = RETRY_S) -> None:
        self._live = LiveLink(guess, TYPICAL_BYTES, retry_s)
        # What was told last, and by what: it is asked for at each step of an engine.
        self._seen: Seen = ()
        self._seen_at = (0, 0.0)

    @property
    def samples(self) -> int:
        """Fetches that were learned from."""
        return self._live.samples

    def saw(self, n_bytes: int, seconds: float, now_s: float) -> None:
        """So many bytes were there in so many seconds."""
        if n_bytes > 0 and seconds > 0.0:
            self._live.saw(TransferSample(n_bytes, seconds), now_s)

    def saw_at_most(self, n_bytes: int, seconds: float, now_s: float) -> None:
        """They were there by then, and perhaps before."""
        if seconds < self.curve(now_s).seconds(n_bytes):
            self.saw(n_bytes, seconds, now_s)

    def saw_at_least(self, n_bytes: int, seconds: float, now_s: float) -> None:
        """They were not there before."""
        if seconds > self.curve(now_s).seconds(n_bytes):
            self.saw(n_bytes, seconds, now_s)

    def saw_between(self, n_bytes: int, least_s: float, most_s: float, now_s: float) -> None:
        """They came after so long at the earliest and at the latest."""
        self.saw_at_most(n_bytes, most_s, now_s)
        self.saw_at_least(n_bytes, least_s, now_s)

    def seen(self, beside_per_byte_s: float = 0.0) -> Seen:
        """Bytes and seconds of the last few, with what each byte takes beside: the same object
        until there are others, or that changes."""
        at = self._live.samples, beside_per_byte_s
        if at != self._seen_at:
            last = self._live.seen()[-_SHOWN:]
            rows = ((n_bytes, s + beside_per_byte_s * n_bytes) for n_bytes, s in last)
            self._seen_at, self._seen = at, tuple((n, float(f"{s:.3g}")) for n, s in rows)
        return self._seen

    def curve(self, now_s: float) -> LinkCurve:
        """What it costs now. Two digits of it: it is told whenever it changes."""
        return self._live.curve(now_s)
