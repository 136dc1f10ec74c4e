"""How often a vault's client tries a shard that it lost."""

import time
from contextlib import suppress
from typing import Any, cast

import pytest

from kv.errors import VaultLostError
from workers.vault import line as line_module
from workers.vault.line import Line, Session

PAUSE_S = 0.05


class _Welcomed:
    """What a shard that welcomes whoever comes gives."""

    def close(self) -> None:
        pass


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(line_module, "RETRY_S", PAUSE_S)
    return Line("vault-0", lambda: cast(Session, _Welcomed()))


def _again_s(line: Line, fails: bool) -> float:
    """Use the line, once it is up, for a call that fails or not; how long it took to be up."""
    begun = time.monotonic()
    assert line.await_up(begun + 10.0)
    took_s = time.monotonic() - begun
    with suppress(VaultLostError), line.session(time.monotonic() + 1.0):
        if fails:
            raise VaultLostError("vault-0", "no answer in time", "wait")
    return took_s


def test_a_shard_that_only_welcomes_is_tried_ever_more_seldom(line: Line) -> None:
    """Welcomes do not shorten the pause, which doubles with each call that fails; one that
    succeeds ends it."""
    pauses_s = [_again_s(line, fails=True) for _ in range(5)][1:]
    for turn, pause_s in enumerate(pauses_s):
        assert pause_s >= 0.9 * PAUSE_S * 2**turn
    last: Any = pauses_s[-1]
    _again_s(line, fails=False)
    _again_s(line, fails=True)
    assert _again_s(line, fails=False) < last / 2
    line.close()
