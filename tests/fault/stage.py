"""Whose turn it is: several clusters at once would not fit in a small machine's memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from tests.fault.books import Books
from tests.flow.cluster_process import Cluster

Started = AbstractContextManager[Cluster]


class Stage:
    """One cluster at a time: modules that want the same one share it, another one ends it."""

    def __init__(self) -> None:
        self._ending = ExitStack()
        self._name, self._shown = "", None

    def show(self, name: str, start: Callable[[], Started]) -> tuple[Cluster, Books]:
        """The cluster of this name, started if it does not run, with its books at rest."""
        if self._shown is None or name != self._name:
            self.clear()
            cluster = self._ending.enter_context(start())
            self._name, self._shown = name, (cluster, Books.of(cluster))
        return self._shown

    def clear(self) -> None:
        """End what runs."""
        self._shown = None
        self._ending.close()
