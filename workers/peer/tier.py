"""The peer tier as vLLM's offloading framework sees it: another replica's host tier over NIXL.

vLLM's own `p2p` tier is moved by the engine's steps, on both sides, and keeps both stepping at
rest; it writes into the reader's memory, which a reader that gave up may have given to another
block; and it has no checksums (docs/decisions/0016). Nothing of it is used here.
"""

import threading
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import zmq
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kv.head import Head
from kv.offload_disk import layout_of, tag_of
from kv.offload_host import HostTier
from workers.curve import ClientKeys
from workers.peer.fetch import Wanted, fetch
from workers.peer.keys import PeerKeys
from workers.peer.line import Line
from workers.peer.question import Finding, Question
from workers.peer.server import PeerServer
from workers.peer.session import Session
from workers.tiers import PeerHint, peer_of

logger = init_logger(__name__)

# After a tenant was forgotten here, how long its blocks are taken from nobody: the order reaches
# the replica that holds them a little earlier or later.
FORGOTTEN_S = 60.0
# Peers that were asked and may be asked again; an ended replica's address never comes back.
_MOST_LINES = 256


class Load:
    """The job of fetching blocks into rows of the host tier.

    It is over when all has come, when the peer failed, or at its deadline by the engine's thread,
    whatever the line's thread is doing then. NIXL may still write into its rows in the last case:
    `host` gives them to nobody until the connection is closed.
    """

    def __init__(
        self,
        job: TransferJob,
        question: Question,
        view: memoryview,
        host: HostTier,
        verifying: ThreadPoolExecutor,
    ) -> None:
        self.job, self.question, self._host = job, question, host
        self.deadline_s, self.began_s = question.answer_by_s, time.monotonic()
        self._verifying = verifying
        rows = job.chunk_ids.tolist()
        self._row_bytes = view.strides[0] if view.strides else 0
        self._wanted = [
            (key, row, view[row : row + 1].cast("B"))
            for key, row in zip(job.keys, rows, strict=True)
        ]
        self._landed: set[int] = set()
        self._held: list[int] = []
        self._lock = threading.Lock()
        self._running = self._over = False
        # While its connection works for it alone, and no step of the engine is waited for.
        self._run_s = self._came_s = 0.0
        self.settled = threading.Event()

    def over(self) -> bool:
        return self._over

    def came(self) -> tuple[int, float] | None:
        """Bytes and the seconds that they took; None unless all of them came."""
        if not self._came_s or len(self._landed) < len(self.job.keys):
            return None
        return len(self._landed) * self._row_bytes, self._came_s

    def run(self, session: Session) -> None:
        with self._lock:
            if self._over:
                return
            self._running = True
        self._run_s = time.monotonic()
        damaged = fetch(session, self._verifying, self._wanted, self._land, self.deadline_s)
        self._came_s = time.monotonic() - self._run_s
        self._settle()
        if damaged:
            words = "peer %s: %d of %d blocks came damaged and are computed"
            logger.warning(words, session.address, damaged, len(self.job.keys))

    def fail(self) -> None:
        """What has come stays; the rest is a miss. Nothing comes any more."""
        self.question.failed = True
        self._settle()

    def late(self) -> bool:
        """Whether the deadline is over before it is."""
        return not self._over and time.monotonic() >= self.deadline_s

    def abandon(self) -> None:
        """End it now; bytes may still come. On the engine's thread."""
        self.question.failed = True
        with self._lock:
            if self._over:
                return
            self._over = True
            if self._running:
                self._held = [row for _, row, _ in self._missing()]
                self._host.hold_back(self._held)
            else:
                self._release()

    def result(self) -> JobResult:
        """To be asked for once it is over."""
        keys = list(self.job.keys)
        done = tuple(keys[index] for index in sorted(self._landed))
        # Another try would fail as well, and end in as many bytes.
        missing = set(keys).difference(done)
        self.question.answers.update(dict.fromkeys(missing, False))
        return JobResult(
            self.job.job_id,
            success=not missing,
            successful_keys=done,
            transfer_time=time.monotonic() - self.began_s,
            transfer_bytes=len(done) * self._row_bytes,
        )

    def _land(self, indices: list[int]) -> None:
        with self._lock:
            if not self._over:
                self._landed.update(indices)

    def _settle(self) -> None:
        with self._lock:
            if self._running:
                # Another tenant may get the row before anything else is written there.
                for _, _, row in self._missing():
                    row[:] = bytes(len(row))
            self._over, self._running = True, False
            self._host.let_go(self._held)
            self._release()

    def _missing(self) -> list[Wanted]:
        return [each for at, each in enumerate(self._wanted) if at not in self._landed]

    def _release(self) -> None:
        self._wanted = []
        self.settled.set()


class PeerTier(SecondaryTierManager):
    """Blocks of the replica that a request's hint names (`workers.tiers.with_peer`).

    A miss for everything until `open` was called, and for requests without a hint. The engine's
    thread only.
    """

    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.P2P
    # Each replica's host tier has its own blocks; nothing is sent to a peer.
    stores: ClassVar[bool] = False

    def __init__(
        self,
        offloading_spec: TieringOffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        timeout_s: float,
        identity: str,
        backpressure_detector: Any = None,
    ) -> None:
        """`identity` says all of the model and its options that the spec does not know."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        self._timeout_s = timeout_s
        self._fingerprint = layout_of(offloading_spec, identity)
        self._keys: ClientKeys | None = None
        self.server: PeerServer | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._verifying = ThreadPoolExecutor(1, thread_name_prefix="peer-verify")
        self._lines: dict[str, Line] = {}
        self._asking: list[Question] = []
        self._loads: dict[int, Load] = {}
        self._unsettled: list[Load] = []
        self._finished: list[JobResult] = []
        self._came: list[tuple[int, float]] = []
        self._forgotten: dict[str, float] = {}

    def open(self, host: str, keys: PeerKeys, lender: HostTier) -> str:
        """Lend the host tier's blocks to peers from now on, at the address that is returned, and
        fetch theirs. From any thread, before the engine steps."""
        view = self._primary_kv_view
        self.server = PeerServer(host, keys.server, self._fingerprint, lender, view)
        self._keys, self._host = keys.client, lender
        return self.server.address

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        hint = peer_of(req_context.kv_transfer_params)
        if hint is not None and self._keys is not None and hint.address != self._own_address:
            req_context.set_state(self._question(hint, req_context))
        return RequestOffloadingContext()

    def _question(self, hint: PeerHint, req_context: ReqContext) -> Question:
        line, timeout_s = self._line(hint.address), hint.timeout_s or self._timeout_s
        if req_context.get_state(Head) is None:
            return Question(line, min(self._timeout_s, timeout_s), self._timeout_s)
        return Question(line, timeout_s, self._timeout_s, req_context.req_id)

    def on_request_finished(self, req_context: ReqContext) -> None:
        # What it computed is in the host tier now, or never will be.
        if self.server is not None:
            self.server.end(req_context.req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        question = req_context.get_state(Question)
        if question is None or question.failed or self._is_forgotten(req_context):
            return LookupResult.MISS
        head = req_context.get_state(Head)
        if head is not None and not head.is_peers(key, req_context.get_offload_key_position(key)):
            return LookupResult.MISS
        here = question.look(key)
        if question.unsent and question not in self._asking:
            self._asking.append(question)
        if here is None:
            return LookupResult.RETRY
        return LookupResult.HIT if here else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        asking, self._asking = self._asking, []
        for question in asking:
            keys, question.unsent = question.unsent, []
            question.line.submit(Finding(question, keys))

    def submit_load(self, job_metadata: TransferJob) -> None:
        question = job_metadata.req_context.get_state(Question)
        assert question is not None, "a block was found without a question"
        view = self._primary_kv_view
        load = Load(job_metadata, question, view, self._host, self._verifying)
        self._loads[job_metadata.job_id] = load
        if question.failed or self._is_forgotten(job_metadata.req_context):
            load.abandon()
        else:
            question.line.submit(load)

    def submit_store(self, job_metadata: TransferJob) -> None:
        # `kv.offload_tiers.Tiers` gives no such jobs to a tier that does not store.
        self._finished.append(JobResult(job_metadata.job_id, success=True))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job_id, load in list(self._loads.items()):
            if load.late():
                load.question.line.rest(f"{len(load.job.keys)} blocks did not come in time")
                load.abandon()
            if load.over():
                self._finished.append(self._loads.pop(job_id).result())
                if (came := load.came()) is not None:
                    self._came.append(came)
                self._unsettled.append(load)
        self._unsettled = [load for load in self._unsettled if not load.settled.is_set()]
        finished, self._finished = self._finished, []
        return finished

    def loads(self) -> Iterable[tuple[int, float]]:
        """Of each load since the last call of which all came: bytes, and the seconds from when it
        was its turn until the last of them was here, whatever the engine did meanwhile."""
        came, self._came = self._came, []
        return came

    def erase(self, tags: Collection[str]) -> int:
        """Take no more blocks of these tenants for `FORGOTTEN_S`; always 0, since those that came
        are the host tier's to erase."""
        now = time.monotonic()
        self._forgotten = {tag: until for tag, until in self._forgotten.items() if until > now}
        self._forgotten.update(dict.fromkeys(tags, now + FORGOTTEN_S))
        for load in self._loads.values():
            if tag_of(load.job.req_context) in tags:
                load.abandon()
        return 0

    def drain_jobs(self) -> None:
        # Not later than each one's deadline, but for the time that NIXL takes to end.
        for load in [*self._loads.values(), *self._unsettled]:
            left_s = max(0.0, load.deadline_s - time.monotonic())
            if not load.settled.wait(left_s):
                load.abandon()
                load.settled.wait()

    def shutdown(self) -> None:
        for load in self._loads.values():
            load.abandon()
        for line in self._lines.values():
            line.close()
        if self.server is not None:
            self.server.close()
            self.server = None
        self._verifying.shutdown(wait=False)

    @property
    def _own_address(self) -> str | None:
        return None if self.server is None else self.server.address

    def _is_forgotten(self, req_context: ReqContext) -> bool:
        if not self._forgotten:
            return False
        return time.monotonic() < self._forgotten.get(tag_of(req_context), 0.0)

    def _line(self, address: str) -> Line:
        line = self._lines.pop(address, None)
        if line is None:
            assert self._keys is not None
            connect = partial(
                Session,
                self._context,
                address,
                self._keys,
                self._fingerprint,
                self._primary_kv_view,
            )
            line = Line(address, connect)
        # The youngest last; the oldest goes.
        self._lines[address] = line
        if len(self._lines) > _MOST_LINES:
            self._lines.pop(next(iter(self._lines))).close()
        return line
