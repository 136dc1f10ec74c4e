"""The two classes of requests on one vLLM scheduler: urgent ones, and those that give way.

A request that yields has vLLM's priority 1, any other 0, which orders those that wait. What else it
takes for urgent ones to come first is decided in `workers.give_way` and carried out here, between
two steps: the order of those that run, who of them is held, how many tokens the next step has, and
who is preempted. A preempted request finds its blocks in the paged KV again, as far as they were
not needed, and computes the rest of what it had. Once its patience is over a request is as urgent
as any.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request, RequestStatus

from workers.give_way import Running, Scene, give_way
from workers.messages import Yielding

_URGENT, _YIELDS = 0, 1
# One that tiers keep waiting cannot use what was given up for it at once; whoever gave it up may
# have it back meanwhile, and is asked again after so many steps.
_ASK_AGAIN_STEPS = 16
_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Classes:
    """Of one vLLM scheduler with the policy `priority`; on the engine's thread. `now` is the clock
    that vLLM stamps events with."""

    def __init__(self, scheduler: Any, now: Callable[[], float]) -> None:
        self._scheduler, self._now = scheduler, now
        self._step_tokens = scheduler.max_num_scheduled_tokens
        # By request: until when it gives way.
        self._until: dict[str, float] = {}
        self._step = 0
        # The urgent request for which others gave way last, and at which step.
        self._asked: tuple[str, int] = ("", 0)

    def admit(self, request: Request, patience_s: float | None) -> None:
        """Before the scheduler has it."""
        request.priority = _URGENT if patience_s is None else _YIELDS
        if patience_s is not None:
            self._until[request.request_id] = self._now() + patience_s

    def begin_step(self) -> None:
        """Before vLLM schedules; `end_step` follows, whatever happens."""
        if not self._until:
            return
        self._follow()
        scheduler = self._scheduler
        # Streams first: what is left of a step's tokens then goes to prompts.
        scheduler.running.sort(key=lambda r: (r.priority, r.priority and _computes(r)))
        self._step += 1
        ready = [*filter(self._is_ready, scheduler.kv_holding_waiting)]
        holding = len(ready)
        ready += filter(self._is_ready, scheduler.waiting)
        way = give_way(self._scene(ready, holding))
        scheduler.max_num_scheduled_tokens = way.step_tokens
        for name in way.held:
            # vLLM counts a step as it begins to schedule it.
            scheduler.requests[name].next_decode_eligible_step = scheduler.current_step + 2
        if way.preempted and self._asks(ready[0].request_id):
            for name in way.preempted:
                self._preempt(scheduler.requests[name])

    def end_step(self) -> None:
        """Give the next step all its tokens again."""
        self._scheduler.max_num_scheduled_tokens = self._step_tokens

    def yielding(self, pending: dict[str, int]) -> Yielding:
        """The part of the load that gives way; `pending` are tokens to compute, by request."""
        if not self._until:
            return Yielding()
        self._follow()
        manager = self._scheduler.kv_cache_manager
        running = sum(each.request_id in self._until for each in self._scheduler.running)
        tokens = [left for name, left in pending.items() if name in self._until]
        usage = sum(map(self._pages, self._until)) / manager.block_pool.num_gpu_blocks
        return Yielding(len(self._until) - running, running, len(tokens), sum(tokens), usage)

    def _follow(self) -> None:
        """Requests that ended are nobody's, and patience ends."""
        now, requests = self._now(), self._scheduler.requests
        for name, until in list(self._until.items()):
            request = requests.get(name)
            if request is None or request.is_finished():
                del self._until[name]
            elif until <= now:
                del self._until[name]
                self._make_urgent(request)

    def _make_urgent(self, request: Request) -> None:
        for waiting in (self._scheduler.waiting, self._scheduler.kv_holding_waiting):
            there = len(waiting)
            waiting.remove_requests({request})
            request.priority = _URGENT
            if len(waiting) < there:
                waiting.add_request(request)
        request.priority = _URGENT

    def _asks(self, name: str) -> bool:
        """Whether others give way to this request now."""
        last, step = self._asked
        if name == last and self._step - step < _ASK_AGAIN_STEPS:
            return False
        self._asked = (name, self._step)
        return True

    def _scene(self, ready: Sequence[Request], holding: int) -> Scene:
        """`ready` ones wait, in the order in which vLLM takes them: the first `holding` of them
        have their pages and lack a seat alone."""
        scheduler = self._scheduler
        pool = scheduler.kv_cache_manager.block_pool
        freed = sum(len(blocks) for _, blocks in scheduler.deferred_frees)
        return Scene(
            running=tuple(self._running(each) for each in scheduler.running),
            waiting=len(ready),
            waiting_tokens=sum(map(self._waiting_tokens, ready)),
            first_pages=self._lacked_pages(ready[0]) if ready and not holding else 0,
            free_pages=pool.get_num_free_blocks() + freed,
            free_seats=scheduler.max_num_active_reqs - len(scheduler.running),
            step_tokens=self._step_tokens,
        )

    def _is_ready(self, request: Request) -> bool:
        """Whether an urgent request waits for nothing but its turn."""
        received = request.request_id in self._scheduler.finished_recving_kv_req_ids
        return request.priority == _URGENT and (request.status in _READY or received)

    def _waiting_tokens(self, request: Request) -> int:
        """What it would take of a step: of a prompt that a handoff brings one token is computed,
        and nothing yet where tiers are still asked."""
        if request in self._scheduler.deferred_waiting and request.status in _READY:
            return 0
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return 1
        return max(1, int(request.num_tokens - request.num_computed_tokens))

    def _running(self, request: Request) -> Running:
        left = request.num_tokens_with_spec + request.num_output_placeholders
        yields = request.request_id in self._until
        return Running(
            name=request.request_id,
            yields=yields,
            computes=_computes(request),
            left_tokens=max(1, left - request.num_computed_tokens),
            arrived_s=request.arrival_time,
            pages=self._pages(request.request_id) if yields else 0,
        )

    def _pages(self, request_id: str) -> int:
        """Pages that a request holds."""
        return sum(map(len, self._scheduler.kv_cache_manager.get_blocks(request_id).blocks))

    def _lacked_pages(self, request: Request) -> int:
        """Pages that a waiting request takes of the free ones, cached blocks that nobody reads
        among them."""
        manager = self._scheduler.kv_cache_manager
        blocks, _, _ = manager.get_computed_blocks(request)
        groups = zip(manager.coordinator.single_type_managers, blocks.blocks, strict=True)
        return sum(
            cdiv(request.num_tokens, each.block_size) - sum(page.ref_cnt > 0 for page in held)
            for each, held in groups
        )

    def _preempt(self, request: Request) -> None:
        scheduler = self._scheduler
        scheduler.running.remove(request)
        scheduler._preempt_request(
            request, self._now(), drop_stale_output=scheduler.requires_kv_delivery
        )
        # As vLLM does where a request may be preempted and resumed in one step.
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def _computes(request: Request) -> bool:
    """Whether it has more to compute than the next token of its answer."""
    known = request.num_tokens + request.num_output_placeholders
    return bool(known - request.num_computed_tokens > 1)
