"""Dynamo's side of `decision.py`: its in-process `SelectionService`, told what to do by JSON lines.

Runs in an environment of its own with ai-dynamo-runtime, pyzmq, msgspec, xxhash and psutil. Workers
publish their blocks as vLLM does: msgpack batches over ZMQ, a socket each.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from array import array
from typing import Any

import msgspec
import psutil
import xxhash
import zmq
from decision_load import BLOCK_TOKENS, CHAIN_BLOCKS, CHAIN_TOKENS, Load, prefer_this
from decision_load import tokens as chain_tokens
from dynamo.llm import SelectionService

MODEL = "m"
# Chains published before waiting until they are known.
BATCH = 2_000
# Time for one change to be taken in before the next decision is timed, as it has threads for that.
SETTLE_S = 0.0005
# Dynamo names a block by xxh3_64 of its tokens with this seed (its "KV Events & Hashing" page).
HASH_SEED = 1337

_encode = msgspec.msgpack.Encoder().encode


class Selector:
    """The service, and the sockets of its workers."""

    def __init__(self, load: Load, folder: str) -> None:
        self.load, self.churn = load, load.churn()
        self.service = SelectionService(indexer_threads=1)
        context = zmq.Context(1)
        self.sockets, self.sequences = [], [0] * load.replicas
        for replica in range(load.replicas):
            socket = context.socket(zmq.PUB)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(self.address(folder, replica))
            self.sockets.append(socket)

    @staticmethod
    def address(folder: str, replica: int) -> str:
        return f"ipc://{folder}/{replica}"

    async def register(self, folder: str) -> None:
        for replica in range(self.load.replicas):
            await self.service.upsert_worker(
                {
                    "worker_id": replica,
                    "model_name": MODEL,
                    "endpoint": f"http://{replica}",
                    "block_size": BLOCK_TOKENS,
                    "max_num_batched_tokens": 8192,
                    "total_kv_blocks": 10**6,
                    "data_parallel_start_rank": 0,
                    "data_parallel_size": 1,
                    "kv_events_endpoints": {0: self.address(folder, replica)},
                }
            )
        await asyncio.sleep(2.0)  # subscriptions reach the publishers

    def store(self, replica: int, chain: int, start: int, end: int) -> None:
        tokens = chain_tokens(chain)[start * BLOCK_TOKENS : end * BLOCK_TOKENS]
        self.publish(
            replica,
            {
                "type": "BlockStored",
                "block_hashes": [_name(chain, block) for block in range(start, end)],
                "parent_block_hash": _name(chain, start - 1) if start else None,
                "token_ids": tokens,
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
        )

    def remove(self, replica: int, chain: int, start: int, end: int) -> None:
        hashes = [_name(chain, block) for block in range(start, end)]
        self.publish(replica, {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"})

    def publish(self, replica: int, event: dict[str, object]) -> None:
        number = self.sequences[replica]
        self.sequences[replica] += 1
        batch = _encode([time.time(), [event], 0])
        self.sockets[replica].send_multipart([b"", number.to_bytes(8, "big"), batch])

    async def fill(self) -> dict[str, float]:
        before, began, blocks = _rss(), time.perf_counter(), 0
        for first in range(0, self.load.chains, BATCH):
            last = min(first + BATCH, self.load.chains)
            for chain in range(first, last):
                for replica, depth in self.load.holdings(chain):
                    self.store(replica, chain, 0, depth)
                    blocks += depth
            for chain in range(max(first, last - 2 * self.load.replicas), last):
                await self.known(chain)
        spent_s = time.perf_counter() - began
        kept = self.load.chains * CHAIN_BLOCKS
        return {
            "blocks": kept,
            "fill_blocks_s": blocks / spent_s,
            "bytes_a_block": (_rss() - before) / kept,
        }

    async def known(self, chain: int) -> None:
        """Returns when a chain is found whole on its replica."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            best = await self.service.select(
                {"model_name": MODEL, "token_ids": chain_tokens(chain)}
            )
            if best["overlap"]["longest_matched"] >= CHAIN_TOKENS:
                return
            await asyncio.sleep(0.002)
        raise TimeoutError(f"chain {chain} is not known after 60 s: {best}")

    async def round(self, decisions: int, seed: int) -> dict[str, list[float]]:
        prompts, churn = self.load.prompts(seed), self.churn
        by_tokens, by_hashes = [], []
        for tokens, change in zip(itertools.islice(prompts, decisions), churn, strict=False):
            self.store(change.adds_to, *change.added)
            self.remove(change.removes_from, *change.removed)
            await asyncio.sleep(SETTLE_S)
            by_tokens.append(await self.decide({"model_name": MODEL, "token_ids": tokens}))
            by_hashes.append(await self.decide(_hashed(tokens)))
        return {"decision_us": by_tokens, "hashes_us": by_hashes}

    async def decide(self, request: dict[str, Any]) -> float:
        began = time.perf_counter_ns()
        await self.service.select(request)
        return (time.perf_counter_ns() - began) / 1e3


def _name(chain: int, block: int) -> int:
    """An engine's own 64-bit name of a block."""
    return int(xxhash.xxh3_64_intdigest(f"{chain}/{block}".encode()))


def _hashed(tokens: list[int]) -> dict[str, Any]:
    """The same question with the blocks' hashes passed in."""
    local, sequence, parent = [], [], b""
    packed, width_bytes = array("I", tokens).tobytes(), 4 * BLOCK_TOKENS
    for start in range(0, len(packed), width_bytes):
        block = xxhash.xxh3_64_intdigest(packed[start : start + width_bytes], HASH_SEED)
        name = block if not parent else _pair(parent, block)
        parent = name.to_bytes(8, "little")
        local.append(_signed(block))
        sequence.append(_signed(name))
    return {
        "model_name": MODEL,
        "block_hashes": local,
        "sequence_hashes": sequence,
        "isl_tokens": len(tokens),
    }


def _pair(parent: bytes, block: int) -> int:
    return xxhash.xxh3_64_intdigest(parent + block.to_bytes(8, "little"), HASH_SEED)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


async def main() -> None:
    blocks, replicas, core = map(int, sys.argv[1:4])
    prefer_this(core)
    with tempfile.TemporaryDirectory(prefix="breakeven-dynamo-") as folder:
        selector = Selector(Load(blocks, replicas), folder)
        await selector.register(folder)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "fill":
                answer: dict[str, Any] = dict(await selector.fill())
            else:
                answer = dict(await selector.round(order["decisions"], order["seed"]))
            print(json.dumps(answer), flush=True)
        selector.service.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
