"""How long one load of a peer's blocks took."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from workers.peer import tier
from workers.peer.tier import Load

ROW_BYTES, BLOCKS = 4096, 3
SESSION: Any = SimpleNamespace(address="tcp://127.0.0.1:1")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Load]]:
    """A load of which so many blocks will come, within 50 ms."""
    memory = memoryview(bytearray(BLOCKS * ROW_BYTES)).cast("B", (BLOCKS, ROW_BYTES))
    host: Any = SimpleNamespace(let_go=lambda _: None, hold_back=lambda _: None)

    def load(coming: int) -> Load:
        def fetch(_: Any, __: Any, wanted: Any, land: Any, ___: float) -> int:
            time.sleep(0.05)
            land(list(range(coming)))
            return len(wanted) - coming

        monkeypatch.setattr(tier, "fetch", fetch)
        keys = [bytes([at]) * 32 for at in range(BLOCKS)]
        job: Any = SimpleNamespace(job_id=1, keys=keys, chunk_ids=np.arange(BLOCKS))
        question: Any = SimpleNamespace(answer_by_s=time.monotonic() + 9, failed=False, answers={})
        return Load(job, question, memory, host, verifying)

    with ThreadPoolExecutor(1) as verifying:
        yield load


def test_waiting_for_other_loads_and_for_a_step_is_none_of_the_link_s_time(
    made: Callable[[int], Load],
) -> None:
    """Only from when it is its turn until the last block is here; vLLM counts all of it."""
    load = made(BLOCKS)
    time.sleep(0.3)  # its connection works for another
    load.run(SESSION)
    time.sleep(0.3)  # the engine steps
    assert load.came() == (BLOCKS * ROW_BYTES, pytest.approx(0.05, abs=0.1))
    assert (load.result().transfer_time or 0.0) > 0.6


@pytest.mark.parametrize("coming", [0, BLOCKS - 1])
def test_a_load_of_which_not_all_came_says_nothing(
    made: Callable[[int], Load], coming: int
) -> None:
    """It took as long as it was let, or what failed it."""
    load = made(coming)
    assert load.came() is None
    load.run(SESSION)
    assert load.over()
    assert load.came() is None
