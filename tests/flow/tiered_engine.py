"""One engine with tiers in a process of its own, which does what a test tells it.

`tiered_engine.py MODEL FOLDER SETTINGS` reads one order a line, `[name, arguments]`, and answers
each with one line. The engine is configured as a replica's is: NIXL and the tiers beside it.
"""

import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.app import engine_options, environment
from cluster.config import load

ROOT = Path(__file__).resolve().parents[2]
BLOCK_TOKENS = 32
# Beyond the last full block, so that a device hit and a restore compute the same tokens.
TAIL_TOKENS = 5
SECRET = b"of these engines".ljust(32)


def prompt(seed: int, blocks: int) -> list[int]:
    """So many full blocks and a tail."""
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(blocks * BLOCK_TOKENS + TAIL_TOKENS)]


class TieredEngine:
    """The process, seen from a test. `tiers` as in the configuration's section; `more` settings are
    for a `Bench` of another program."""

    program = __file__

    def __init__(
        self,
        model: Path,
        folder: Path,
        tiers: dict[str, Any],
        kv_bytes: int = 1 << 26,
        max_model_len: int = 1536,
        role: str = "decode",
        **more: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "engine.log"
        env = {**os.environ, **environment(load(None, {}), model, 1), "PYTHONPATH": str(ROOT)}
        set_here = {"kv_bytes": kv_bytes, "max_model_len": max_model_len, "role": role}
        settings = json.dumps({"tiers": tiers, **set_here, **more})
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, self.program, str(model), str(folder), settings],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.started = self._answer()

    def ask(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(
        self,
        seed: int,
        blocks: int,
        n: int = 8,
        salt: str | None = None,
        hints: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Tokens and logprobs of a prompt, and how many of its tokens came from where; `peer` is a
        `workers.tiers.PeerHint`."""
        asked = {"seed": seed, "blocks": blocks, "n": n, "salt": salt, "hints": hints, **more}
        answer: dict[str, Any] = self.ask("run", **asked)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def __enter__(self) -> "TieredEngine":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(60)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print too
            if line.startswith("> "):
                return json.loads(line[2:])
        raise AssertionError(f"the engine ended; see {self.log}")


class Bench:
    """In the process: an engine without a channel."""

    def __init__(self, model: str, folder: Path, settings: dict[str, Any]) -> None:
        import msgspec

        from workers import connector
        from workers.messages import Role
        from workers.peer.keys import peer_keys
        from workers.tiers import Tiers, model_identity, with_tiers

        self._port = connector.prepare("127.0.0.1", folder / "ucx.log", None)
        from workers import options
        from workers.engine import Engine

        connector.calm_progress_thread()
        config = load(None, {"engine": {"kv_cache_memory_bytes": settings["kv_bytes"]}})
        role = Role(settings["role"])
        pool = config.prefill if role is Role.PREFILL else config.decode
        engine = {**engine_options(config, pool), "max_model_len": settings["max_model_len"]}
        engine |= settings.get("engine", {})
        parsed = options.namespace(model, ("tiny",), engine)
        tiers = msgspec.convert(settings["tiers"], Tiers)
        transfer = connector.transfer_config(role, "cpu", 30)
        if tiers:
            transfer = with_tiers(transfer, tiers, model_identity(model, engine))
            self.adapt(transfer, settings)
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine = Engine(options.engine_config(parsed, transfer, True), self._said.put)
        self.peer_address = self.engine.open_peers("127.0.0.1", peer_keys(SECRET))
        self.engine.start()
        self._names = iter(range(1_000_000))
        self._mended = threading.Event()
        self._preempted = 0
        self._count_preemptions(self.engine.core.scheduler)

    def adapt(self, transfer: dict[str, Any], settings: dict[str, Any]) -> None:
        """Change the engine's `kv_transfer_config`; here it is a replica's."""

    def run(
        self,
        seed: int,
        blocks: int,
        n: int,
        salt: str | None = None,
        first_blocks: int = 0,
        hints: dict[str, Any] | None = None,
        settle: bool = True,
        peer: dict[str, Any] | None = None,
        keep: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request alone; of `first_blocks` and their tail only, if set. `hints` are the fields
        of `kv.plan.Hints`, `peer` of `workers.tiers.PeerHint`, `keep` of `workers.messages.Keep`.
        """
        from workers.tiers import PeerHint, with_peer

        ids = prompt(seed, blocks)
        if first_blocks:
            ids = ids[: first_blocks * BLOCK_TOKENS + TAIL_TOKENS]
        params = None if peer is None else with_peer(None, PeerHint(**peer))
        return self._counted(ids, n, salt, params, hints=hints, settle=settle, keep=keep)

    def address(self) -> str:
        """Where peers are lent blocks."""
        return self.peer_address

    def handoff(self, seed: int, blocks: int) -> dict[str, Any]:
        """Compute a prompt and keep it for another engine; its answer has a `handoff`."""
        from workers.connector import KEEP_FOR_DECODE

        return self._counted(prompt(seed, blocks), 1, None, KEEP_FOR_DECODE, settle=False)

    def take(self, seed: int, blocks: int, handoff: dict[str, Any]) -> dict[str, Any]:
        """Answer behind another engine's handoff."""
        return self._counted(prompt(seed, blocks), 8, None, handoff)

    def _counted(
        self,
        ids: list[int],
        n: int,
        salt: str | None,
        params: dict[str, Any] | None = None,
        settle: bool = True,
        hints: dict[str, Any] | None = None,
        keep: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        before = self.totals()
        [answer] = self._answers([ids], n, salt, params, hints, keep)
        if settle:
            self.settle()
        after = self.totals()
        return answer | {name: after[name] - before[name] for name in after}

    def burst(self, prompts: list[tuple[int, int]], n: int) -> list[list[int]]:
        """The tokens of several requests at once, each of (seed, blocks)."""
        answers = self._answers([prompt(*each) for each in prompts], n, None)
        self.settle()
        return [answer["tokens"] for answer in answers]

    def _answers(
        self,
        prompts: list[list[int]],
        n: int,
        salt: str | None,
        transfer: dict[str, Any] | None = None,
        hints: dict[str, Any] | None = None,
        keep: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        import msgspec
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder

        from kv.plan import Hints
        from kv.salt import tag_of
        from workers.messages import Keep

        told = None if hints is None else msgspec.convert(hints, Hints)
        kept = None if keep is None else msgspec.convert(keep, Keep)
        decoder = MsgpackDecoder(EngineCoreOutput)
        answers: dict[str, dict[str, Any]] = {}
        began = time.perf_counter()
        for ids in prompts:
            name = str(next(self._names))
            answers[name] = {"tokens": [], "logprobs": [], "at_s": []}
            params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=0)
            if transfer is not None:
                params.extra_args = {"kv_transfer_params": dict(transfer)}
            request = EngineCoreRequest(name, ids, None, params, None, 0.0, None, salt, None)
            request.session_id = tag_of(salt)
            self.engine.add(request, hints=told, keep=kept)
        running = set(answers)
        while running:
            for delta in self._said.get(timeout=180).deltas:
                if delta.request_id not in running:
                    continue
                assert delta.error is None, delta.error
                answer = answers[delta.request_id]
                if delta.token_ids:
                    answer["at_s"].append(time.perf_counter() - began)
                if delta.sources:
                    answer["computed"] = delta.sources.computed_tokens
                    answer["device"] = delta.sources.device_tokens
                    answer["sources"] = delta.sources.by_source()
                    answer["spent"] = msgspec.to_builtins(delta.spent)
                answer["tokens"] += delta.token_ids
                if delta.handoff is not None:
                    answer["handoff"] = delta.handoff
                if delta.extras:
                    rows = decoder.decode(delta.extras).new_logprobs.logprobs
                    answer["logprobs"] += [float(row[0]) for row in rows]
                if delta.finish_reason is not None:
                    running.discard(delta.request_id)
        return list(answers.values())

    def _count_preemptions(self, scheduler: Any) -> None:
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._preempted += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def settle(self) -> None:
        """Wait until nothing is stored or loaded any more."""
        deadline = time.monotonic() + 60
        while self._between_steps(self._busy):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def totals(self) -> dict[str, float]:
        import msgspec

        totals = self._between_steps(self.engine._load).totals
        return msgspec.structs.asdict(totals)

    def reset(self, host: bool) -> bool:
        """Drop the device's blocks, and the host tier's; never those on disk."""
        core = self.engine.core
        return bool(self._between_steps(lambda: core.reset_prefix_cache(reset_connector=host)))

    def forget(self) -> None:
        self.engine.forget()
        self.settle()

    def erase(self, tag: str) -> int:
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.engine.erase((tag,), told.put)
        erased = told.get(timeout=60)
        self.settle()
        return int(erased.blocks)

    def known(self) -> int:
        """Blocks that the catalogue would be told of as the device's."""
        return int(self._between_steps(lambda: len(self.engine._mirror)))

    def told(self) -> dict[str, list[int]]:
        """By tier: blocks that it holds, those that the catalogue would be told of, and the unnamed
        ones."""
        from kv.block import KEY_BYTES
        from kv.catalogue import Tier

        mirror = self.engine._mirror

        def look() -> dict[str, list[int]]:
            return {
                tier: [
                    mirror.blocks(tier),
                    len(mirror.snapshot(tier)) // KEY_BYTES,
                    mirror.unnamed(tier),
                ]
                for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK)
            }

        return dict(self._between_steps(look))

    def costs(self) -> dict[str, list[float]]:
        """By tier: the constant and the seconds a byte that the router would be told, and how many
        fetches that is from."""
        tiers = self._between_steps(self.engine._load).tiers
        return {
            tier: [told.latency_s, told.per_byte_s, told.samples] for tier, told in tiers.items()
        }

    def slow_disk(self, seconds: float) -> None:
        """From now on a block's file takes so much longer to read."""
        [disk] = self.engine._tiers.secondary_tiers
        get = type(disk.store).get

        def slowly(*args: Any) -> None:
            time.sleep(seconds)
            get(disk.store, *args)

        disk.store.get = slowly

    def preemptions(self) -> int:
        """How often a request had to give its blocks up."""
        return self._preempted

    def break_disk(self, fault: str, seconds: float = 0.0) -> None:
        """From now on the disk's files are `full` or `unreadable`, or take `seconds` longer to be
        read and written (`slow`), until `mend_disk`."""
        from kv import disk_files
        from kv.disk_read import Reader

        self._mended.clear()
        self._files = (Reader.read, disk_files.write)
        error = OSError(28, "No space left on device") if fault == "full" else OSError(5, "I/O")

        def broken(theirs: Callable[..., Any]) -> Callable[..., Any]:
            def access(*arguments: Any) -> Any:
                if fault != "slow":
                    raise error
                self._mended.wait(seconds)
                return theirs(*arguments)

            return access

        if fault != "full":
            Reader.read = broken(Reader.read)  # type: ignore[method-assign]
        if fault != "unreadable":
            disk_files.write = broken(disk_files.write)

    def mend_disk(self) -> None:
        from kv import disk_files
        from kv.disk_read import Reader

        Reader.read, disk_files.write = self._files  # type: ignore[method-assign]
        self._mended.set()
        self.settle()

    def host_blocks(self) -> int:
        """Rows of the host tier that hold anything but zeros."""
        import numpy as np

        view = np.asarray(self.engine._tiers.primary_tier.get_kv_memoryview())
        return int(self._between_steps(lambda: int(view.any(axis=1).sum())))

    def remember(self, tag: str) -> int:
        """Keep pieces of the rows of the host tier that are of one tenant; returns how many."""
        self._pieces = self._between_steps(lambda: self._pieces_of(tag))
        return len(self._pieces)

    def remembered(self) -> int:
        """How many of those pieces are in the host tier, wherever."""
        view = self.engine._tiers.primary_tier.get_kv_memoryview()
        content: bytes = self._between_steps(view.tobytes)
        return sum(piece in content for piece in self._pieces)

    def _pieces_of(self, tag: str) -> list[bytes]:
        tiers = self.engine._tiers
        primary = tiers.primary_tier
        chunks = [primary._policy.get(key) for key, its in tiers._tags.items() if its == tag]
        pieces = []
        for chunk in filter(None, chunks):
            row = primary.get_kv_memoryview()[chunk.chunk_id : chunk.chunk_id + 1].tobytes()
            # Of several tokens: the first layer's values of one are the same in every prompt.
            pieces += [row[at : at + 256] for at in range(0, len(row), 1024)]
        return [piece for piece in pieces if any(piece)]

    def cores(self, seconds: float) -> float:
        """Cores that the idle process takes."""
        time.sleep(0.5)
        began, spent = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - spent) / (time.perf_counter() - began)

    def stop(self) -> None:
        self.engine.stop(30)
        self._port.close()

    def _busy(self) -> bool:
        scheduler = self.engine.core.scheduler
        return bool(scheduler.has_requests())

    def _between_steps(self, look: Callable[[], Any]) -> Any:
        found: list[Any] = []
        seen = threading.Event()
        self.engine._orders.put(lambda: (found.append(look()), seen.set())[1])
        assert seen.wait(60)
        return found[0]


def main(program: type[Bench] = Bench) -> None:
    def answer(what: Any) -> None:
        print("> " + json.dumps(what), flush=True)

    began = time.perf_counter()
    bench = program(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    answer({"start_s": time.perf_counter() - began})
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer(getattr(bench, name)(**arguments))
    bench.stop()


if __name__ == "__main__":
    main()
