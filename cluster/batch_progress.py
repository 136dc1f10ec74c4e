"""How far a batch has come: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cluster.batch_file import counted

_LINE_EVERY_S = 10.0


class Progress:
    """Follows one run, on stderr. `known` is what was answered before and is added to meanwhile."""

    def __init__(self, total: int, known: Mapping[str, int]) -> None:
        self._total, self._known = total, known
        self._before, self._began_s = len(known), time.monotonic()
        self._running = 0
        self._told_s = self._began_s
        console = Console(stderr=True)
        columns = (
            TextColumn("batch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console) if console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total, completed=self._before, state="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self) -> None:
        """One more was sent."""
        self._running += 1
        self._tell()

    def end(self, status: int | None) -> None:
        """One has its answer; without a status it got none."""
        self._running -= 1
        self._tell()

    def _tell(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=len(self._known), state=self._state())
        elif time.monotonic() - self._told_s >= _LINE_EVERY_S:
            self._told_s = time.monotonic()
            line = f"batch: {len(self._known)} of {self._total}, {self._state()}"
            print(line, file=sys.stderr, flush=True)

    def _state(self) -> str:
        _, refused = counted(self._known)
        spent_s = max(1e-9, time.monotonic() - self._began_s)
        rate = (len(self._known) - self._before) / spent_s
        refusals = f", {refused} refused" if refused else ""
        return f"{self._running} running, {rate:.1f}/s{refusals}"
