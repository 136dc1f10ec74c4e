"""The scheduler of a simulated engine: who waits, who computes, who streams, what is leased.

Prefills are computed one at a time in order of arrival, each in a step of its own length; every
stream of the engine gets one token a step, so a prefill stalls the streams that run beside it. One
that gives way is computed in chunks, between which urgent ones go first.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xxhash import xxh3_64_intdigest

from kv.block import TOKEN_BYTES, chain, root_key
from kv.catalogue import Tier
from kv.salt import tag_of
from workers.messages import (
    FORGOTTEN,
    Delta,
    Handoff,
    Load,
    Replica,
    Role,
    Sources,
    Spent,
    Submit,
    Totals,
    Yielding,
)
from workers.sim_fetch import Lent, Sought, sought
from workers.sim_host import SimHost
from workers.sim_pages import Grant, Pages
from workers.sim_run import Run, sim_token
from workers.sim_vault import Shelf


@dataclass(frozen=True, slots=True)
class _Lease:
    """A finished prefill's pages, until a decode replica has read them."""

    grant: Grant
    digest: int
    until_s: float


class Steps:
    """What one engine does, without its clock. `settle` ends the lease behind a handoff on
    whichever engine has it, and gives the digest of its prompt or None."""

    def __init__(
        self,
        replica: Replica,
        lease_s: float,
        settle: Callable[[Handoff], int | None],
        host_blocks: int = 0,
        chunk_tokens: int = 512,
        shelf: Shelf | None = None,
    ) -> None:
        self._chunk_tokens, self.shelf = chunk_tokens, shelf
        self._replica, self._lease_s, self._settle = replica, lease_s, settle
        self.pages, self.host = Pages(replica.kv_blocks), SimHost(host_blocks)
        self.runs: dict[str, Run] = {}
        self.streams: list[Run] = []
        self.leases: dict[str, _Lease] = {}
        self._waiting: deque[Run] = deque()
        self._totals: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._forgotten: dict[str, float] = {}
        self._over: set[str] = set()

    def add(self, submit: Submit, now_s: float) -> bool:
        """Queue a request; False if its pages could never fit."""
        known = submit.tokens + submit.answered
        asked, _, salt = submit.body.decode().partition(" ")
        keys = chain(root_key(salt or None), known, self._replica.block_tokens)
        left = int(asked) - len(submit.answered) // TOKEN_BYTES
        max_tokens = 1 if submit.role is Role.PREFILL else left
        digest = xxh3_64_intdigest(submit.tokens)
        run = Run(submit, max_tokens, keys, digest, submit.handoff, tag_of(salt), now_s)
        if submit.handoff is not None:
            recent = now_s < self._forgotten.get(run.tag, 0.0)
            run.concealed = FORGOTTEN in submit.handoff or recent
        if submit.patience_s is not None:
            run.yields, run.patient_until_s = True, now_s + submit.patience_s
        if self._pages_of(run) > self.pages.total:
            return False
        usable, reach_tokens = self._usable(run), 0
        if submit.hints is not None and submit.hints.reach_tokens is not None:
            reach_tokens = min(submit.hints.reach_tokens, run.prompt_tokens - 1)
        depth = self.pages.depth(keys[:usable])
        run.hoped_tokens = max(depth * self._replica.block_tokens, reach_tokens)
        self.runs[submit.request_id] = run
        self._waiting.append(run)
        return True

    def abort(self, request_id: str) -> None:
        """Stop a request. What loads or computes keeps its pages until that is over."""
        run = self.runs.get(request_id)
        if run is None:
            return
        run.aborted = True
        if run in self._waiting:
            self._waiting.remove(run)
            self._end(run)
            if run.handoff is not None:
                self._settle(run.handoff)
        elif run in self.streams:
            self.streams.remove(run)
            self._end(run)
        elif run.sought is not None:
            self._end(run)

    def erase(self, tags: tuple[str, ...], now_s: float) -> tuple[int, int]:
        """What `workers.erasure` does: how many blocks were erased, and how many are in use."""
        self._forgotten.update(dict.fromkeys(tags, now_s + 2 * self._lease_s))
        for run in self.runs.values():
            run.concealed = run.concealed or run.tag in tags
        self.host.erase(tags)
        if self.shelf is not None:
            self.shelf.erase(tags)
        return self.pages.erase(tags, self._grants())

    def admit(self, now_s: float) -> tuple[Run | None, list[Run]]:
        """Give pages in order of arrival, urgent ones first, until one is to compute: that one, and
        who loads."""
        for run in self.runs.values():
            run.yields = run.yields and now_s < run.patient_until_s
        loading: list[Run] = []
        while self._waiting and len(self.streams) < self._replica.max_num_seqs:
            run = next((run for run in self._waiting if not run.yields), self._waiting[0])
            run.sought = self._sought(run, now_s)
            if run.sought is None and not self._reserve(run):
                if run.yields or not self._take_pages():
                    break
                continue
            self._waiting.remove(run)
            if run.begun_s is None:
                run.begun_s, run.before_tokens = now_s, self._prompt_tokens
            if run.handoff is None and run.sought is None:
                return run, loading
            loading.append(run)
        return None, loading

    def chunk(self, run: Run) -> int:
        """Prompt tokens that its next step computes."""
        return min(run.pending_tokens, self._chunk_tokens) if run.yields else run.pending_tokens

    def _take_pages(self) -> bool:
        """Have the youngest that gives way, and waits for its next chunk, start anew."""
        run = next((r for r in reversed(self._waiting) if r.yields and r.grant.private), None)
        if run is not None:
            self.pages.release(run.grant)
            run.before_tokens += run.done_tokens  # they are its own, and no other prompt's
            run.hit_tokens = run.host_tokens = run.done_tokens = 0
        return run is not None

    def loaded(self, run: Run, now_s: float) -> None:
        """A handoff is in and may stream; one that could not be read is computed here."""
        assert run.handoff is not None
        run.loading_s = now_s - (now_s if run.begun_s is None else run.begun_s)
        digest = self._settle(run.handoff)
        if run.aborted:
            self._end(run)
        elif digest is None:
            self._totals["failed_transfers"] += 1
            self.pages.release(run.grant)
            run.handoff, run.hit_tokens, run.host_tokens, run.done_tokens = None, 0, 0, 0
            self._waiting.appendleft(run)
        else:
            self._totals["transfers"] += 1
            run.digest, run.received_tokens = digest, run.prompt_tokens - run.hit_tokens
            self._publish(run)
            self.streams.append(run)

    def fetched(self, run: Run, brought: dict[bytes, Tier], now_s: float) -> None:
        """What it sought is in, as far as it will be: the rest is to compute."""
        run.sought, run.brought = None, brought
        run.loading_s = now_s - (now_s if run.begun_s is None else run.begun_s)
        self._waiting.appendleft(run)

    def computed(self, run: Run, blocks: int) -> None:
        """So many leading blocks of its prompt are copied to the host tier, before it is done."""
        had = (run.hit_tokens + run.host_tokens) // self._replica.block_tokens
        if not run.concealed:
            self.host.put(run.keys[had:blocks], run.tag, run.spare)

    def lent(self, work: str, keys: Sequence[bytes]) -> Lent:
        """What a peer that asks for these blocks is told."""
        run = self.runs.get(work)
        if run is not None:  # it may wait for its next chunk
            self.computed(run, run.had_tokens // self._replica.block_tokens)
        here = tuple(key for key in keys if key in self.host)
        return Lent(here, not work or work in self._over)

    def finish(self, computed: Run | None, now_s: float) -> list[Delta]:
        """The end of a step: a token for every stream, and for what was just computed."""
        if computed is not None and computed.aborted:
            self._end(computed)
        elif computed is not None:
            chunk = self.chunk(computed)
            self._prompt_tokens += chunk
            computed.done_tokens += chunk
            if computed.pending_tokens:
                self._waiting.appendleft(computed)
            else:
                self._publish(computed)
                self.streams.append(computed)
        return [self._next_delta(run, now_s) for run in list(self.streams)]

    def end_lease(self, request_id: str) -> int | None:
        """Give a lease's pages back; the digest of its prompt, None if there is no lease."""
        lease = self.leases.pop(request_id, None)
        if lease is None:
            return None
        self.pages.release(lease.grant)
        return lease.digest

    def expire(self, now_s: float) -> None:
        """End the leases that are over."""
        for request_id in [name for name, lease in self.leases.items() if lease.until_s <= now_s]:
            self._totals["expired_leases"] += 1
            self.end_lease(request_id)

    def load(self) -> Load:
        """How busy it is."""
        started = sum(run.produced > 0 for run in self.runs.values())
        return Load(
            waiting=len(self.runs) - started,
            running=started,
            pending_prefills=sum(run.pending_tokens > 0 for run in self.runs.values()),
            pending_prefill_tokens=sum(run.pending_tokens for run in self.runs.values()),
            leased=len(self.leases),
            kv_usage=self.pages.held / self.pages.total,
            totals=Totals(**self._totals),
            yielding=self._yielding(),
        )

    def _yielding(self) -> Yielding:
        runs = [run for run in self.runs.values() if run.yields]
        started, pending = sum(run.produced > 0 for run in runs), [r.pending_tokens for r in runs]
        left = [tokens for tokens in pending if tokens]
        held = sum(run.grant.private + len(run.grant.named) for run in runs)
        return Yielding(len(runs) - started, started, len(left), sum(left), held / self.pages.total)

    def check(self) -> None:
        """Raise unless requests and leases hold exactly the pages that are held."""
        self.pages.check(self._grants())

    def _grants(self) -> list[Grant]:
        leased = (lease.grant for lease in self.leases.values())
        return [*(run.grant for run in self.runs.values()), *leased]

    def _publish(self, run: Run) -> None:
        if not run.concealed:
            self.pages.publish(run.grant, run.keys, run.tag, run.spare)
            self.host.put(run.keys, run.tag, run.spare)
            if self.shelf is not None and not run.spare:
                self.shelf.put(run.keys, run.tag)

    def _sought(self, run: Run, now_s: float) -> Sought | None:
        """What it is to wait for before it has pages; that is looked for once. Nobody lends what
        was forgotten here of late: a peer may hear of that later."""
        if run.looked or run.submit.handoff is not None:
            return None
        run.looked = True
        keys = run.keys[: self._reach(run, self._usable(run))]
        depth = self.pages.depth(keys)
        lacks = [(at, keys[at]) for at in range(depth, len(keys)) if keys[at] not in self.host]
        lacks = lacks[: self.host.room(run.spare)]
        vault = () if self.shelf is None else self.shelf.vault
        work, hints = run.submit.request_id, run.submit.hints
        if hints is not None and now_s < self._forgotten.get(run.tag, 0.0):
            hints = replace(hints, peer=None)
        return sought(hints, work, lacks, vault, self._replica.block_tokens)

    def _reserve(self, run: Run) -> bool:
        if run.grant.private:
            return True  # it computed a chunk before
        usable = self._usable(run)
        depth = self.pages.depth(run.keys[:usable])
        grant = self.pages.grant(run.keys[:depth], self._pages_of(run) - depth, run.spare)
        if grant is None:
            return False
        run.grant, run.hit_tokens = grant, depth * self._replica.block_tokens
        run.host_tokens = self._fetched(run, depth, usable) * self._replica.block_tokens
        return True

    def _fetched(self, run: Run, depth: int, usable: int) -> int:
        """Blocks behind the device hit that come from the host tier, if the plan lets them."""
        if run.handoff is not None:
            return 0
        keys, brought = run.keys[: self._reach(run, usable)], run.brought
        taken = keys[depth : self.host.reach(keys, depth, brought)]
        tiers = Counter(brought[key] for key in taken if key in brought)
        block_tokens = self._replica.block_tokens
        run.behind = Counter({tier: n * block_tokens for tier, n in tiers.items()})
        return len(taken)

    def _usable(self, run: Run) -> int:
        """The last token is always computed, as in vLLM, since it gives the logits."""
        return (run.prompt_tokens - 1) // self._replica.block_tokens

    def _reach(self, run: Run, usable: int) -> int:
        """Leading blocks that the plan lets it take from tiers, or has it find."""
        hints = run.submit.hints
        if hints is None or hints.reach_tokens is None:
            return usable
        return min(usable, hints.reach_tokens // self._replica.block_tokens)

    def _pages_of(self, run: Run) -> int:
        return -(-(run.prompt_tokens + run.max_tokens) // self._replica.block_tokens)

    def _next_delta(self, run: Run, now_s: float) -> Delta:
        request_id, token = (
            run.submit.request_id,
            sim_token(run.digest, run.answered_tokens + run.produced),
        )
        sources = None if run.produced else self._sources(run)
        spent = None if sources is None else self._spent(run, sources, now_s)
        run.produced += 1
        self._totals["generated_tokens"] += 1
        if run.produced < run.max_tokens:
            return Delta(request_id, [token], sources=sources, spent=spent)
        leases = run.submit.role is Role.PREFILL and not run.submit.lends
        handoff = self._lease(run, now_s) if leases else None
        self.streams.remove(run)
        self._end(run)
        return Delta(request_id, [token], "length", sources=sources, handoff=handoff, spent=spent)

    def _lease(self, run: Run, now_s: float) -> Handoff:
        request_id = run.submit.request_id
        self.leases[request_id] = _Lease(run.grant, run.digest, now_s + self._lease_s)
        run.grant = Grant()
        engine = {"remote_engine_id": self._replica.name, "remote_epoch": self._replica.epoch}
        forgotten = {FORGOTTEN: True} if run.concealed else {}
        return {**engine, "remote_request_id": request_id, **forgotten}

    def _sources(self, run: Run) -> Sources:
        device, received = run.hit_tokens, run.received_tokens
        computed = run.prompt_tokens - device - received - run.host_tokens
        self._totals["prompt_tokens_computed"] += computed
        self._totals["prompt_tokens_device"] += device
        self._totals["prompt_tokens_received"] += received
        host, peer, vault = self._by_tier(run)
        return Sources(run.prompt_tokens, computed, device, received, host, 0, peer, vault)

    def _by_tier(self, run: Run) -> tuple[int, int, int]:
        """Tokens from the host tier itself, from a peer and from the vault."""
        peer, vault = run.behind[Tier.PEER], run.behind[Tier.VAULT]
        host = run.host_tokens - peer - vault
        self._totals["prompt_tokens_host"] += host
        self._totals["prompt_tokens_peer"] += peer
        self._totals["prompt_tokens_vault"] += vault
        return host, peer, vault

    def _spent(self, run: Run, sources: Sources, now_s: float) -> Spent:
        begun_s = now_s if run.begun_s is None else run.begun_s
        loaded_tokens = sources.received_tokens + run.host_tokens
        return Spent(
            queued_s=begun_s - run.arrived_s,
            loading_s=run.loading_s,
            computing_s=now_s - begun_s - run.loading_s,
            loaded_bytes=loaded_tokens * self._replica.kv_bytes_per_token,
            others_tokens=self._prompt_tokens - run.before_tokens - sources.computed_tokens,
        )

    def _end(self, run: Run) -> None:
        self.pages.release(run.grant)
        self._over.add(run.submit.request_id)
        del self.runs[run.submit.request_id]
