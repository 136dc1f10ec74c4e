"""How an engine's loop tells others that it stands still; without an engine."""

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

from tests.waiting import await_that
from workers.engine import Engine


def test_only_the_loop_itself_asks_what_there_is_to_do() -> None:
    """An idle loop stands still by right, one in an order does not; and vLLM's books, which a
    tier's state is in, are read by the thread that writes them."""
    asked_by: set[int] = set()

    def has_requests() -> bool:
        asked_by.add(threading.get_ident())
        return False

    engine: Any = object.__new__(Engine)
    engine._scheduler = SimpleNamespace(has_requests=has_requests)
    engine._core = SimpleNamespace(batch_queue=None)
    engine._orders = queue.SimpleQueue()
    engine._trusted_s = 1e9
    engine._stepped_at, engine._idle = time.monotonic() - 1000.0, True
    loop = threading.Thread(target=engine._take_orders, daemon=True)
    loop.start()
    await_that(lambda: asked_by, "the loop asks")
    assert engine.stalled_s() == 0.0
    begun, over = threading.Event(), threading.Event()
    engine._orders.put(lambda: (begun.set(), over.wait(30)))
    assert begun.wait(30)
    assert 0.0 < engine.stalled_s() < 100.0
    over.set()
    engine._orders.put(None)
    loop.join(30)
    assert asked_by == {loop.ident}
