"""Where the seconds of each request on one engine go, told by what vLLM's scheduler does with it.

vLLM's own events begin when a request is queued, which may be a whole step after it came here, and
say nothing of when fetching its KV began. So the methods by which the scheduler takes requests up
are replaced by such that note the time and call the ones they replace.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.messages import Sources, Spent

_MOST_UNREPORTED = 10_000


@dataclass(slots=True)
class _Times:
    """Of one request. `before_tokens` is what the engine had computed of all prompts when it began
    to load or to compute this one; `beside` it others were loading."""

    arrived_s: float
    lossy: bool
    loads_since_s: float | None = None
    computes_since_s: float | None = None
    before_tokens: int = 0
    beside: bool = False

    @property
    def begun(self) -> bool:
        return self.loads_since_s is not None or self.computes_since_s is not None


class Stopwatch:
    """Of one vLLM scheduler, whose tokens have `token_bytes` of KV; on the engine's thread."""

    def __init__(self, scheduler: Any, token_bytes: int, now: Callable[[], float]) -> None:
        self._token_bytes, self._now = token_bytes, now
        self._prompt_tokens = 0  # computed of all prompts so far
        # Until their first delta; requests that end without one go with time.
        self._times: OrderedDict[str, _Times] = OrderedDict()
        self._scheduler, self._loading = scheduler, set[str]()
        scheduler.schedule = self._noting_runs(scheduler.schedule)
        connector = scheduler.connector
        if connector is not None:
            connector.get_num_new_matched_tokens = self._noting_promotions(
                connector.get_num_new_matched_tokens
            )
            connector.update_state_after_alloc = self._noting_loads(
                connector.update_state_after_alloc
            )

    def arrived(self, request_id: str, at_s: float, lossy: bool = False) -> None:
        """A request that is about to be queued came at this time."""
        self._times[request_id] = _Times(at_s, lossy)
        if len(self._times) > _MOST_UNREPORTED:
            self._times.popitem(last=False)

    def spent(self, request_id: str, sources: Sources) -> Spent | None:
        """Of a request whose first token leaves the engine now; None for one that was not told."""
        times, now_s = self._times.pop(request_id, None), self._now()
        self._loading.discard(request_id)
        if times is None:
            return None
        computes_s = now_s if times.computes_since_s is None else times.computes_since_s
        begun_s = computes_s if times.loads_since_s is None else times.loads_since_s
        others = self._prompt_tokens - times.before_tokens - sources.computed_tokens
        loaded = sources.prompt_tokens - sources.computed_tokens - sources.device_tokens
        return Spent(
            queued_s=max(0.0, begun_s - times.arrived_s),
            loading_s=max(0.0, computes_s - begun_s),
            computing_s=max(0.0, now_s - computes_s),
            loaded_bytes=loaded * self._token_bytes,
            others_tokens=max(0, others) if times.begun else 0,
            lossy=times.lossy,
            beside=times.beside,
        )

    def _noting_runs(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            began_s, output = self._now(), schedule(*args)
            for new in output.scheduled_new_reqs:
                times = self._times.get(new.req_id)
                if times is not None and times.computes_since_s is None:
                    self._begin(times)
                    times.computes_since_s = began_s
                    self._loading.discard(new.req_id)
            # A stream has one token a step.
            counts = output.num_scheduled_tokens.values()
            self._prompt_tokens += sum(tokens for tokens in counts if tokens > 1)
            return output

        return noting

    def _noting_promotions(self, match: Callable[..., Any]) -> Callable[..., Any]:
        def noting(request: Any, n_tokens: int) -> Any:
            began_s, found = self._now(), match(request, n_tokens)
            if found[0] is None:  # tiers behind the host tier were asked for it
                self._load(request.request_id, began_s)
            return found

        return noting

    def _noting_loads(self, allocated: Callable[..., Any]) -> Callable[..., Any]:
        def noting(request: Any, blocks: Any, loaded_tokens: int) -> None:
            if loaded_tokens > 0:
                self._load(request.request_id, self._now())
            allocated(request, blocks, loaded_tokens)

        return noting

    def _load(self, request_id: str, at_s: float) -> None:
        times = self._times.get(request_id)
        if times is not None and not times.begun:
            self._begin(times)
            times.loads_since_s = at_s
            self._loads_beside(request_id, times)

    def _loads_beside(self, request_id: str, times: _Times) -> None:
        """One link brings what all of them ask for: none is alone on it."""
        there = self._scheduler.requests  # those that were aborted have left
        self._loading = {name for name in self._loading if name in there}
        for name in self._loading:
            if (other := self._times.get(name)) is not None:
                other.beside = True
        times.beside = bool(self._loading)
        self._loading.add(request_id)

    def _begin(self, times: _Times) -> None:
        if not times.begun:
            times.before_tokens = self._prompt_tokens
