"""An engine on which requests of both classes meet, each at a step of its own
(`tiered_engine.py`)."""

from collections.abc import Sequence
from typing import Any

from tests.flow.tiered_engine import Bench, TieredEngine, main, prompt


class ClassesEngine(TieredEngine):
    """The process, seen from a test."""

    program = __file__

    def race(self, *asked: dict[str, Any]) -> list[dict[str, Any]]:
        """What becomes of requests; see `ClassesBench.race`."""
        answers: list[dict[str, Any]] = self.ask("race", asked=asked)
        return answers


def batch(seed: int, blocks: int, n: int = 8, at_step: int = 0, **more: Any) -> dict[str, Any]:
    """A batch request, of a patience that no test outlives."""
    fields = {"seed": seed, "blocks": blocks, "n": n, "at_step": at_step}
    return {**fields, "patience_s": 600.0, "yields": True, **more}


def person(seed: int, blocks: int, n: int = 8, at_step: int = 0) -> dict[str, Any]:
    """An interactive request."""
    return {"seed": seed, "blocks": blocks, "n": n, "at_step": at_step}


class ClassesBench(Bench):
    """In the process."""

    def race(self, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tokens of requests, the steps of their first and last one, and a handoff if any. Each
        comes before the engine's step after its `at_step`, counted from the first request; one with
        `behind` as soon as the first has given so many tokens."""
        engine, said = self.engine, self._said
        names = [str(next(self._names)) for _ in asked]
        answers = [{"tokens": [], "first_step": None} for _ in asked]
        steps, begin, given = 0, engine._classes.begin_step, 0

        def counted() -> None:
            nonlocal steps
            for name, each in zip(names, asked, strict=True):
                if each["at_step"] == steps > 0:
                    self._add(name, each)
            steps += 1
            begin()

        def listen(report: Any) -> None:
            nonlocal given
            said.put((steps, report))
            more = sum(len(d.token_ids) for d in report.deltas if d.request_id == names[0])
            for name, each in zip(names, asked, strict=True):
                if given < each.get("behind", 0) <= given + more:
                    self._add(name, each)
            given += more

        engine._listener = listen
        engine._classes.begin_step = counted  # type: ignore[method-assign]

        def begin_all() -> None:
            for name, each in zip(names, asked, strict=True):
                if each["at_step"] == 0:
                    self._add(name, each)

        self._between_steps(begin_all)
        running = set(names)
        while running:
            step, report = said.get(timeout=180)
            for delta in report.deltas:
                if delta.request_id not in running:
                    continue
                assert delta.error is None, delta.error
                answer: dict[str, Any] = answers[names.index(delta.request_id)]
                if delta.token_ids and answer["first_step"] is None:
                    answer["first_step"] = step
                answer["tokens"] += delta.token_ids
                if delta.handoff is not None:
                    answer["handoff"] = delta.handoff
                if delta.sources is not None:
                    answer["sources"] = delta.sources.by_source()
                if delta.finish_reason is not None:
                    answer["last_step"] = step
                    running.discard(delta.request_id)
        engine._classes.begin_step = begin  # type: ignore[method-assign]
        self._between_steps(lambda: setattr(engine, "_listener", said.put))
        self.settle()
        while not said.empty():
            said.get()
        return answers

    def yielding(self) -> list[int]:
        """The part of the load that gives way."""
        told = self._between_steps(self.engine._load).yielding
        return [told.waiting, told.running, told.pending_prefills, told.pending_prefill_tokens]

    def _add(self, name: str, asked: dict[str, Any]) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        from kv.salt import tag_of
        from workers.messages import Keep

        params = SamplingParams(temperature=0.0, max_tokens=asked["n"], ignore_eos=True)
        if asked.get("transfer") is not None:
            params.extra_args = {"kv_transfer_params": dict(asked["transfer"])}
        ids = prompt(asked["seed"], asked["blocks"])
        # They come in the order in which they are named.
        request = EngineCoreRequest(name, ids, None, params, None, float(name), None, None, None)
        request.session_id = tag_of(None)
        keep = Keep(yields=asked.get("yields", False))
        self.engine.add(request, keep=keep, patience_s=asked.get("patience_s"))


if __name__ == "__main__":
    main(ClassesBench)
