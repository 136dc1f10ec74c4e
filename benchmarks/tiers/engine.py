"""The engine that the tiers' benchmarks drive: the flow tests' own, in a process of its own."""

from pathlib import Path
from typing import Any

from tests.flow.tiered_engine import Bench, TieredEngine, main, prompt

# A block of tokens past the warm-up's; the answer stays within the prompt's last block, so that
# blocks are only stored for the prompt.
ANSWER_TOKENS = 8
WARM_SEED, WARM_BLOCKS = 999_983, 4


class MeasuredEngine(TieredEngine):
    """The process, seen from a benchmark.

    `secondary_tiers` as vLLM's own configuration has them take the place of the disk tier.
    """

    program = __file__

    def warm(self) -> None:
        """A prompt of its own: what a process does once has been done."""
        for _ in range(2):
            self.run(WARM_SEED, WARM_BLOCKS)

    def streams(self, seeds: list[int], blocks: int, n: int) -> dict[str, Any]:
        """Answers to several prompts at once: when their tokens came, which, and the counters."""
        answer: dict[str, Any] = self.ask("streams", seeds=seeds, blocks=blocks, n=n)
        return answer

    def read_bytes(self) -> int:
        """What the process has had read from storage: what the page cache held is not in it."""
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return int(counts["read_bytes"])


class MeasuredBench(Bench):
    """In the process."""

    def adapt(self, transfer: dict[str, Any], settings: dict[str, Any]) -> None:
        if settings.get("secondary_tiers"):
            _, offloading = transfer["kv_connector_extra_config"]["connectors"]
            extra = offloading["kv_connector_extra_config"]
            extra["secondary_tiers"] = settings["secondary_tiers"]

    def streams(self, seeds: list[int], blocks: int, n: int) -> dict[str, Any]:
        before = self.totals()
        answers = self._answers([prompt(seed, blocks) for seed in seeds], n, None)
        self.settle()
        after = self.totals()
        return {
            "at_s": [answer["at_s"] for answer in answers],
            "tokens": [answer["tokens"] for answer in answers],
            **{name: after[name] - before[name] for name in after},
        }


if __name__ == "__main__":
    main(MeasuredBench)
