"""An engine with a peer tier and a vault, whose requests a test watches while they run.

As `vault_engine.py` and `peering_engine.py`; requests come as they do over the direct channel.
"""

import time
from typing import Any

from tests.flow.peering_engine import PeeringBench
from tests.flow.tiered_engine import BLOCK_TOKENS, main, prompt
from tests.flow.vault_engine import VaultBench, VaultEngine


class SplittingEngine(VaultEngine):
    """The process, seen from a test."""

    program = __file__


class SplittingBench(PeeringBench, VaultBench):
    """In the process."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._began: dict[str, tuple[float, dict[str, float]]] = {}
        self._step = self.engine.core.step_fn
        self._first_s: dict[str, float] = {}
        listener = self.engine._listener

        def noted(report: Any) -> None:
            for delta in report.deltas:
                self._first_s.setdefault(delta.request_id, time.perf_counter())
            listener(report)

        self.engine._listener = noted

    def submit(
        self,
        work: str,
        seed: int,
        blocks: int,
        head_blocks: int = 0,
        hints: dict[str, Any] | None = None,
    ) -> None:
        """Begin a request under this id; with `head_blocks` the prefill of these, to be lent."""
        import msgspec
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackEncoder

        from kv.block import pack_tokens
        from kv.plan import Hints
        from workers.messages import Role, Submit
        from workers.work import engine_request

        ids = prompt(seed, blocks)
        if head_blocks:
            ids = ids[: head_blocks * BLOCK_TOKENS]
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
        request = EngineCoreRequest(work, None, None, params, None, 0.0, None, None, None)
        [body] = map(bytes, MsgpackEncoder().encode(request))
        role = Role.PREFILL if head_blocks else Role.DECODE
        told = msgspec.convert(hints or {}, Hints)
        made = Submit(work, role, pack_tokens(ids), body, hints=told, lends=bool(head_blocks))
        self._began[work] = time.perf_counter(), self.totals()
        self.engine.add(engine_request(made), hints=made.hints)

    def collect(self, work: str) -> dict[str, Any]:
        """A request's answer, once it has ended and all that it left to do is done."""
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.serial_utils import MsgpackDecoder

        decoder = MsgpackDecoder(EngineCoreOutput)
        began_s, before = self._began.pop(work)
        answer: dict[str, Any] = {"tokens": [], "logprobs": [], "handoff": None}
        ended = False
        while not ended:
            for delta in self._said.get(timeout=60).deltas:
                if delta.request_id != work:
                    continue
                assert delta.error is None, delta.error
                if delta.sources:
                    answer["sources"] = delta.sources.by_source()
                answer["tokens"] += delta.token_ids
                answer["handoff"] = delta.handoff
                if delta.extras:
                    rows = decoder.decode(delta.extras).new_logprobs.logprobs
                    answer["logprobs"] += [float(row[0]) for row in rows]
                ended = delta.finish_reason is not None
        answer["first_s"] = self._first_s[work] - began_s
        self.settle()
        after = self.totals()
        return answer | {at: after[at] - before[at] for at in after}

    def abort(self, work: str) -> None:
        """Stop a request that nobody collects."""
        self._began.pop(work)
        self.engine.abort([work])

    def slow_steps(self, seconds: float) -> None:
        """From now on each step with a request takes so much longer."""
        core, step = self.engine.core, self._step

        def slowly() -> Any:
            if core.scheduler.has_unfinished_requests():
                time.sleep(seconds)
            return step()

        self._between_steps(lambda: setattr(core, "step_fn", slowly))

    def slow_vault(self, block_s: float) -> None:
        """From now on a block from the vault takes so much longer."""
        pages = self._vault._vault
        load = type(pages).load

        def slowly(wanted: Any, *args: Any) -> Any:
            time.sleep(block_s * len(wanted))
            return load(pages, wanted, *args)

        pages.load = slowly

    def held(self) -> int:
        """Blocks of the host tier that can be used."""
        host = self.engine._tiers.primary_tier
        chunks = host._policy.chunks
        return int(self._between_steps(lambda: sum(c.is_ready for c in chunks.values())))


if __name__ == "__main__":
    main(SplittingBench)
