"""What encryption costs on the direct channel: both ends in one process, over loopback.

`python benchmarks/channel/run.py` prints one JSON object. Arms alternate, and each figure is the
median of its rounds. CPU seconds are the process's, ZMQ's threads included, so of both ends.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import zmq

from workers import curve
from workers.channel import ChannelLink
from workers.curve import client_keys, server_keys
from workers.erasure import Erased
from workers.messages import Delta, Forget, Forgotten, Load, Reply, Role, Step, Welcome
from workers.server import ReplicaServer
from workers.sim import SimCosts, sim_replica

SECRET = bytes(32)
STREAMS = (1, 32)


class Engine:
    """Answers an order at once."""

    failure = None

    def stalled_s(self) -> float:
        return 0.0

    def snapshot(self, receiver: Callable[[bytes], None]) -> None:
        receiver(b"")

    def abort(self, request_ids: list[str]) -> None:
        pass

    def erase(self, tags: tuple[str, ...], receiver: Callable[[Erased], None]) -> None:
        receiver(Erased(0, 0))


class Inbox:
    def __init__(self) -> None:
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()

    def receive(self, reply: Reply) -> None:
        self.replies.put_nowait(reply)

    async def next(self, kind: type) -> None:
        while not isinstance(await self.replies.get(), kind):
            pass


@contextlib.contextmanager
def arm(name: str) -> Iterator[None]:
    """`plain` leaves encryption out at both ends."""
    if name == "curve":
        yield
        return

    async def nobody(*_: object) -> None:
        await asyncio.Event().wait()

    with (
        patch.object(curve, "lock", lambda *_: None),
        patch.object(curve, "unlock", lambda *_: None),
        patch.object(curve, "admit", nobody),
    ):
        yield


async def measure(rounds_trips: int, steps: int) -> dict[str, float]:
    """One connection: milliseconds to a welcome, microseconds of a roundtrip and of a step."""
    server, inbox = ReplicaServer("127.0.0.1", server_keys(SECRET)), Inbox()
    replica = sim_replica("decode-0", Role.DECODE, SimCosts())
    serving = asyncio.create_task(server.serve(Engine(), replica))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    began = time.perf_counter()
    link = ChannelLink(server.address, "ingress-0", inbox, client_keys(SECRET))
    await inbox.next(Welcome)
    seen = {"connect_ms": (time.perf_counter() - began) * 1e3}
    trips = []
    for number in range(rounds_trips):
        began = time.perf_counter()
        link.send(Forget(str(number), ()))
        await inbox.next(Forgotten)
        trips.append(time.perf_counter() - began)
    seen["roundtrip_us"] = statistics.median(trips) * 1e6
    for streams in STREAMS:
        names = [f"request-{n:032d}" for n in range(streams)]
        for name in names:
            server._owner[name] = next(iter(server._peers))
        deltas = [Delta(name, [12345]) for name in names]
        report: Any = SimpleNamespace(deltas=deltas, changes=(), load=Load())
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            server.report(report)
            await inbox.next(Step)
        seen[f"step_{streams}_us"] = (time.perf_counter() - began) / steps * 1e6
        seen[f"step_{streams}_cpu_us"] = (time.process_time() - cpu) / steps * 1e6
    link.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--roundtrips", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    asked = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"plain": [], "curve": []}
    for _ in range(asked.rounds):
        for name, seen in rows.items():
            with arm(name):
                seen.append(asyncio.run(measure(asked.roundtrips, asked.steps)))
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "zmq": zmq.zmq_version(),
        "rounds": asked.rounds,
    }
    for name, seen in rows.items():
        keys = seen[0]
        result[name] = {k: round(statistics.median(row[k] for row in seen), 1) for k in keys}
        result[f"{name}_spread"] = {
            k: [round(f(row[k] for row in seen), 1) for f in (min, max)] for k in keys
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
