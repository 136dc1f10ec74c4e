"""The vocabulary of a plan: where each span of a prompt comes from, and why that was chosen."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite

from kv.catalogue import Tier
from kv.errors import PlanError
from kv.parts import Part

# Visible ASCII without the characters that separate the parts of a header.
REPLICA_NAME = re.compile(r"[!-:<>-?A-~]+")


class Shape(StrEnum):
    """What a plan does; P is the prefill replica, D the decode replica."""

    LOCAL = "local"  # D uses its own hit and computes the rest
    REMOTE = "remote"  # P computes from its own hit and hands off to D
    FETCH = "fetch"  # D fetches a cached prefix and computes the suffix
    FETCH_REMOTE = "fetch-remote"  # P fetches the prefix, computes the suffix and hands off
    SPLIT = "split"  # P computes the head while D fetches the tail


class Source(StrEnum):
    """Where the KV of a span comes from."""

    HIT = "hit"  # in the replica's device tier already
    FETCH = "fetch"  # moved into the replica from a tier
    COMPUTE = "compute"  # prefilled by the replica


class Reason(StrEnum):
    """Why a plan was chosen: the one closed list for logs, metrics, headers and the audit."""

    ONLY_REPLICA = "only_replica"  # nothing else was routable
    CHEAPER_LOCAL = "cheaper_local"  # computing on D costs less than the best handoff
    CHEAPER_REMOTE = "cheaper_remote"  # computing on P, with the handoff, costs less than on D
    CHEAPER_FETCH = "cheaper_fetch"  # taking a prefix from tiers costs less than computing it
    OVERLAP = "overlap"  # computing the head on P while D fetches the tail costs less than either
    NO_PREFILL_REPLICA = "no_prefill_replica"  # several D were routable, but no P
    NO_CATALOGUE = "no_catalogue"  # nobody could say what is cached where: planned as if nothing
    SESSION = "session"  # about as cheap as the best, and where this session's other turns go
    KEPT = "kept"  # about as cheap as the best, and where the prefix is: a copy was spared
    EXACT_NAMES = "exact_names"  # exact blocks cost less than those of the codec that is allowed
    EXPLORED = "explored"  # dearer than the best, to find out whether a curve still holds
    PROMPT_LOGPROBS = "prompt_logprobs"  # every position is computed where the answer is made
    LEAST_LOADED = "least_loaded"  # the kill switch: costs were not looked at
    PREFIX_AFFINITY = "prefix_affinity"  # a baseline: the longest cached prefix
    ROUND_ROBIN = "round_robin"  # a baseline: whose turn it was
    THRESHOLD = "threshold"  # a baseline: fetched past a fixed number of tokens
    ALWAYS_FETCH = "always_fetch"  # a baseline: fetched whatever it costs
    ALWAYS_COMPUTE = "always_compute"  # a baseline: computed whatever it costs
    PREFILL_LOST = "prefill_lost"  # the next plan after a prefill replica failed
    DECODE_LOST = "decode_lost"  # the next plan after a decode replica failed


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens [start_token, end_token) and the replica that has, gets or computes their KV.

    `tier` is where a fetch takes them from, and `codec` the lossy one by which that may have stored
    them. Raises PlanError for an empty span, a replica name that
    does not fit in a header, a fetch without a tier, and a tier without a fetch.
    """

    source: Source
    start_token: int
    end_token: int
    replica: str
    tier: Tier | None = None
    codec: str | None = None

    @property
    def tokens(self) -> int:
        """How many."""
        return self.end_token - self.start_token

    def __post_init__(self) -> None:
        if (self.tier is None) is (self.source is Source.FETCH):
            raise PlanError(
                f"{self.source} span at {self.replica}",
                f"its tier is {self.tier}",
                "give fetches a tier, and nothing else",
            )
        if not 0 <= self.start_token < self.end_token:
            raise PlanError(
                f"{self.source} span at {self.replica}",
                f"tokens [{self.start_token}, {self.end_token})",
                "leave empty spans out and start at 0 or later",
            )
        if not REPLICA_NAME.fullmatch(self.replica):
            raise PlanError(
                "span", f"replica name {self.replica!r}", "use visible ASCII without ; = @"
            )


@dataclass(frozen=True, slots=True)
class Hints:
    """What the replica that computes may take from its tiers.

    Of the prompt's first `reach_tokens` (None: of all) those that its paged KV lacks, from `tiers`,
    as far as they are there within `deadline_s` of being asked for (None: however long that takes).
    What lies behind is computed, whatever tiers hold. By default everything is. `peer` is where
    another replica lends blocks; without it none is asked.

    In a split that replica computes the prompt's first `head_tokens`, under the same request id.
    They come from there as they are computed, and from `tiers` only once that one has failed, or
    `head_deadline_s` are over; the others come from `tiers` at once.
    """

    reach_tokens: int | None = 0
    tiers: tuple[Tier, ...] = ()
    deadline_s: float | None = None
    peer: str | None = None
    head_tokens: int = 0
    head_deadline_s: float = 0.0


# For plans that know nothing of tiers: the engine takes what it has.
UNHINTED = Hints(None, tuple(Tier))


@dataclass(frozen=True, slots=True)
class Rival:
    """A plan that was costed and not chosen. `cost_s` is the objective that plans are ranked by."""

    shape: Shape
    prefill: str | None
    decode: str
    predicted_ttft_s: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen plan of one request: spans that tile its prompt, and the next best rivals.

    `cost_s` is the objective that plans are ranked by: predicted seconds, plus a price in seconds
    for GPU time, bytes moved and cache displaced. `hints` are for the replica that computes.
    `parts` are what the predicted TTFT is made of: the last of them ends with it. A policy that
    prices none gives none. Raises PlanError for no spans, for spans with a gap, an overlap or a
    start after token 0, and for a prediction below 0 or not finite.
    """

    shape: Shape
    reason: Reason
    prefill: str | None
    decode: str
    spans: tuple[Span, ...]
    predicted_ttft_s: float
    cost_s: float
    rivals: tuple[Rival, ...]
    hints: Hints = Hints()
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not (isfinite(self.predicted_ttft_s) and self.predicted_ttft_s >= 0.0):
            raise PlanError(
                f"{self.shape} plan",
                f"predicted TTFT {self.predicted_ttft_s} s",
                "cost it with finite curves and queues",
            )
        _check_tiling(self.shape, self.spans)

    def coded(self, codec: str) -> "Plan":
        """The same plan for a request under the names of a lossy codec, by which vaults store."""
        spans = (
            replace(span, codec=codec) if span.tier is Tier.VAULT else span for span in self.spans
        )
        return replace(self, spans=tuple(spans))

    def because(self, reason: Reason) -> "Plan":
        """The same plan, made for another reason."""
        return replace(self, reason=reason)

    def header(self) -> str:
        """The value of `x-breakeven-plan`: tokens by source and replica, hits first, even if none.

        For instance `remote; hit=96@prefill-0 compute=928@prefill-0; predicted_ttft_ms=812;
        reason=cheaper_remote`, on one line. A fetch names its tier too, `fetch=512@decode-0/host`,
        and a lossy codec, `fetch=512@decode-0/vault/int8`.
        """
        shown = [
            f"{source}={span.tokens}@{_place(span)}"
            for source in Source
            for span in self.spans
            if span.source is source
        ]
        if not shown[0].startswith(Source.HIT):
            shown.insert(0, "hit=0")
        ttft_ms = round(self.predicted_ttft_s * 1000)
        spans = " ".join(shown)
        return f"{self.shape}; {spans}; predicted_ttft_ms={ttft_ms}; reason={self.reason}"


def _place(span: Span) -> str:
    return "/".join(each for each in (span.replica, span.tier, span.codec) if each is not None)


def _check_tiling(shape: Shape, spans: tuple[Span, ...]) -> None:
    covered_tokens = 0
    for span in spans:
        if span.start_token != covered_tokens:
            raise PlanError(
                f"{shape} plan",
                f"a span starts at token {span.start_token}, {covered_tokens} are covered",
                "give spans in prompt order without gaps or overlaps",
            )
        covered_tokens = span.end_token
    if not spans:
        raise PlanError(f"{shape} plan", "0 spans", "cover the prompt from token 0")
