"""Writing the audit down, beside the event loop: no request waits for a disk or fails by it.

Records go through a bounded queue to a thread of its own. What does not fit into the queue while
the disk is slow, and what cannot be written, is dropped; how much is counted, and told once a
minute.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kv.audit import encode
from router.audit import Footprint, Record
from router.entry import Scribe
from router.rotation import RotatingLines
from router.settings import AuditPlace

logger = logging.getLogger(__name__)

# Records that wait for the disk: some MB, and a second of the most that one ingress serves. Of very
# long prompts fewer do: the keys of so many blocks take 50 MB.
_WAITING = 1000
_WAITING_BLOCKS = 1_000_000
_TELL_EVERY_S = 60.0
# After a failure nothing is tried for so long: a full disk would get half a line at each try.
_AGAIN_S = 1.0


class AuditLog(Collector):
    """A `Log` that writes files named after `writer`. `now` is a clock in seconds; it is read on
    the loop and on the thread."""

    def __init__(
        self,
        place: AuditPlace,
        writer: str,
        scribe: Scribe,
        now: Callable[[], float],
        waiting: int = _WAITING,
    ) -> None:
        self._scribe, self._now, self._folder = scribe, now, place.folder
        self._lines = RotatingLines(Path(place.folder), writer, place.file_bytes, place.files)
        self._queue: queue.Queue[tuple[Record, Footprint] | None] = queue.Queue(waiting)
        # Each is counted by one side only: the loop's and the thread's.
        self._blocks_in = self._blocks_out = 0
        self._lost = _Lost(now)
        self._rest_until = float("-inf")
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records that were not written."""
        return self._lost.count

    def add(self, record: Record, footprint: Footprint) -> None:
        """Have a closed record written, or drop it while too many wait."""
        blocks = self._blocks_in + len(footprint.keys)
        if blocks - self._blocks_out > _WAITING_BLOCKS:
            self._lost.add("blocks of long prompts wait for the disk")
            return
        try:
            self._queue.put_nowait((record, footprint))
        except queue.Full:
            self._lost.add(f"{self._queue.maxsize} others wait for the disk")
            return
        self._blocks_in = blocks

    def close(self, timeout_s: float) -> None:
        """Write what waits, as far as that can be done in time."""
        try:
            self._queue.put(None, timeout=timeout_s / 2)
        except queue.Full:
            return
        self._thread.join(timeout_s / 2)

    def collect(self) -> Iterator[Metric]:
        """`breakeven_audit_dropped_total`."""
        yield CounterMetricFamily(
            "breakeven_audit_dropped", "Audit records that were not written", self.dropped
        )

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            # The thread's edge: it outlives whatever is wrong with one record or with the disk.
            except Exception as error:
                if isinstance(error, OSError):
                    self._rest_until = self._now() + _AGAIN_S
                self._lost.add(_complaint(error, self._folder))
            self._blocks_out += len(item[1].keys)
        self._lines.close()
        self._lost.tell()

    def _write(self, record: Record, footprint: Footprint) -> None:
        if self._now() < self._rest_until:
            self._lost.add(None)
            return
        self._lines.append(encode(self._scribe.entry(record, footprint)))


class _Lost:
    """Counts what was dropped and tells it once a minute, with the last reason."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self.count = self._told = 0
        self._tell_from = float("-inf")
        self._why = ""

    def add(self, why: str | None) -> None:
        """One more, for this reason or the one before."""
        with self._lock:
            self.count += 1
            self._why = why or self._why
            due = self._now() >= self._tell_from
        if due:
            self.tell()

    def tell(self) -> None:
        """Say how many there were since this was said last, if there were any."""
        with self._lock:
            untold, self._told, why = self.count - self._told, self.count, self._why
            self._tell_from = self._now() + _TELL_EVERY_S
        if untold:
            logger.warning("audit: records not written: %d; %s", untold, why)


def _complaint(error: Exception, folder: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or folder}: {error.strerror}"
    return f"{type(error).__name__}: {error}"
