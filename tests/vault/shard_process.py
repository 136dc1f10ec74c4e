"""A vault shard in a process of its own: `shard_process.py NAME FOLDER`, settings in FOLDER.

Writes its address to FOLDER/NAME.address once it serves, and ends on SIGTERM.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tests.waiting import await_that
from workers.vault import keys
from workers.vault.client import ShardSeat, VaultClient
from workers.vault.line import Session
from workers.vault.process import ShardProcess, ShardSettings

SECRET = b"of this test".ljust(32)
FINGERPRINT = "0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class ShardHandle:
    """A shard that runs, or was killed and may be started again with what its disk holds."""

    def __init__(self, folder: Path, name: str, env: dict[str, str], **settings: Any) -> None:
        self.folder, self.name = folder, name
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        given: dict[str, Any] = {"fingerprint": FINGERPRINT, "memory_bytes": 64 * MIB, **settings}
        self._settings = ShardSettings(host="127.0.0.1", keys=keys.shard_keys(SECRET), **given)
        self.start()

    def start(self) -> None:
        """A new process under the old name; returns once it serves."""
        told = self.folder / f"{self.name}.address"
        told.unlink(missing_ok=True)
        settings = self.folder / f"{self.name}.json"
        settings.write_bytes(msgspec.json.encode(self._settings))
        command = [sys.executable, __file__, self.name, str(self.folder)]
        with (self.folder / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(command, env=self._env, cwd=ROOT, stderr=log)
        await_that(
            lambda: told.exists() or self.process.poll() is not None, f"{self.name} serves", 30.0
        )
        assert self.process.poll() is None, self.log()
        self.seat = ShardSeat(told.read_text())

    def send(self, number: signal.Signals) -> None:
        """A signal; after SIGKILL it is gone when this returns."""
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait(10)

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def shard(
    folder: Path, name: str = "vault-0", env: dict[str, str] | None = None, **settings: Any
) -> Iterator[ShardHandle]:
    """A shard that serves."""
    handle = ShardHandle(folder, name, env or {}, **settings)
    try:
        yield handle
    finally:
        handle.end()


@contextlib.contextmanager
def client(
    *shards: ShardHandle, secret: bytes = SECRET, fingerprint: str = FINGERPRINT, **kwargs: Any
) -> Iterator[VaultClient]:
    """A client of these shards, connected to all of them."""
    seats = {each.name: each.seat for each in shards}
    kwargs.setdefault("staging_bytes", 8 * MIB)
    made = VaultClient(seats, keys.client_keys(secret), fingerprint, **kwargs)
    try:
        assert made.await_up(20.0)
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def session(
    handle: ShardHandle, staging_bytes: int = MIB, fingerprint: str = FINGERPRINT
) -> Iterator[Session]:
    """A bare connection, for what no client does."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address, theirs = handle.seat.address, keys.client_keys(SECRET)
    made = Session(context, address or "", theirs, fingerprint, staging_bytes)
    try:
        yield made
    finally:
        made.close()
        context.term()


async def _serve(name: str, folder: Path) -> None:
    settings = msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=ShardSettings)
    process = ShardProcess(name, settings)
    serving = asyncio.create_task(process.serve())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    draft = folder / f"{name}.draft"
    draft.write_text(process.address)
    draft.rename(folder / f"{name}.address")
    with contextlib.suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
