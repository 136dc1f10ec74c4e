"""Whether a model may use a codec: what was measured of it, held against what config asks.

A verdict is measured on real engines over a fixed set of prompts, greedily: how many of the tokens
are those of lossless restores, and how far a token's logprob moved at most. Verdicts are kept by
the model's fingerprint. A codec without a verdict that passes is not used.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

import msgspec

from kv.errors import CodecError

FILE_VERSION = 1
_GATE_DIGITS = 16


class GateReason(StrEnum):
    """Why a codec may be used or not."""

    LOSSLESS = "lossless"  # nothing to measure
    PASSED = "passed"
    UNMEASURED = "unmeasured"  # no verdict of this model and codec
    OUTDATED = "outdated"  # the verdict is of other prompts or another form of the payload
    TOO_FEW_TOKENS = "too_few_tokens"  # the verdict compared fewer tokens than asked
    TOKENS_DIFFER = "tokens_differ"
    LOGPROBS_DIFFER = "logprobs_differ"


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a verdict must meet. The defaults let int8 pass on the default model, with 0.09 and all
    tokens equal, and stop 4 bits, with 1.0 and a third differing (FACTS.md). Raises CodecError for
    limits that nothing or everything meets.
    """

    min_token_agreement: float = 0.99  # of 1
    max_logprob_delta: float = 0.25  # nats
    min_tokens: int = 256  # compared

    def __post_init__(self) -> None:
        if not (0 < self.min_token_agreement <= 1 and self.min_tokens > 0):
            raise CodecError(
                "gate",
                f"min_token_agreement {self.min_token_agreement}, min_tokens {self.min_tokens}",
                "give an agreement above 0 and at most 1, and at least 1 token",
            )
        if not (isfinite(self.max_logprob_delta) and self.max_logprob_delta > 0):
            raise CodecError(
                "gate", f"max_logprob_delta {self.max_logprob_delta}", "give a number above 0"
            )


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What restoring a fixed set of prompts through a codec changed. `prompts` is a digest of that
    set, `payload_version` `kv.codecs.frame.VERSION` at the time. Raises CodecError for counts that
    contradict each other and for a delta below 0 or not finite.
    """

    prompts: str
    payload_version: int
    tokens: int
    agreed_tokens: int
    max_logprob_delta: float

    def __post_init__(self) -> None:
        counts_fit = 0 <= self.agreed_tokens <= self.tokens and self.tokens > 0
        if not (counts_fit and isfinite(self.max_logprob_delta) and self.max_logprob_delta >= 0):
            raise CodecError(
                "verdict",
                f"{self.agreed_tokens} of {self.tokens} tokens, delta {self.max_logprob_delta}",
                "measure the codec again",
            )

    @property
    def token_agreement(self) -> float:
        return self.agreed_tokens / self.tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one answer: how many of its first tokens are the exact one's, and by how many nats a
    logprob moved."""

    agreed_tokens: int
    max_logprob_delta: float


def compare(exact: Sequence[tuple[int, float]], lossy: Sequence[tuple[int, float]]) -> Comparison:
    """Hold two greedy answers, as tokens and their logprobs, against each other.

    They are compared up to the first token that differs: what follows answers another prompt. The
    logprob of the likeliest token counts there too; it moves no more than some token's does.
    """
    deltas = []
    for agreed, ((token, logprob), (other, other_logprob)) in enumerate(
        zip(exact, lossy, strict=True)
    ):
        deltas.append(abs(logprob - other_logprob))
        if token != other:
            return Comparison(agreed, max(deltas))
    return Comparison(len(deltas), max(deltas, default=0.0))


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the codec may be used, why, and the figures of that."""

    allowed: bool
    reason: GateReason
    detail: str


def decide(
    lossless: bool, verdict: Verdict | None, prompts: str, payload_version: int, limits: GateLimits
) -> Decision:
    """Hold a codec's verdict against `limits`; only one of these prompts and this payload counts.

    Limits themselves are met: agreement and delta may equal them.
    """
    if lossless:
        return Decision(True, GateReason.LOSSLESS, "every bit comes back")
    if verdict is None:
        return Decision(False, GateReason.UNMEASURED, "no verdict of this model")
    measured = (verdict.prompts, verdict.payload_version)
    if measured != (prompts, payload_version):
        detail = f"of prompts and payload {measured}, not {(prompts, payload_version)}"
        return Decision(False, GateReason.OUTDATED, detail)
    return _held_against(verdict, limits)


def _held_against(verdict: Verdict, limits: GateLimits) -> Decision:
    if verdict.tokens < limits.min_tokens:
        detail = f"{verdict.tokens} tokens compared, {limits.min_tokens} wanted"
        return Decision(False, GateReason.TOO_FEW_TOKENS, detail)
    if verdict.token_agreement < limits.min_token_agreement:
        detail = (
            f"{verdict.agreed_tokens} of {verdict.tokens} tokens agree, "
            f"{limits.min_token_agreement:.2%} wanted"
        )
        return Decision(False, GateReason.TOKENS_DIFFER, detail)
    detail = f"logprobs move by {verdict.max_logprob_delta:g}, {limits.max_logprob_delta:g} allowed"
    if verdict.max_logprob_delta > limits.max_logprob_delta:
        return Decision(False, GateReason.LOGPROBS_DIFFER, detail)
    return Decision(True, GateReason.PASSED, detail)


def gate_id(model: str, codec: str, payload_version: int, limits: GateLimits) -> str:
    """Names what a lossy block was let through as: 64 bits of SHA-256, as hex.

    It changes with the model's fingerprint, the codec, its payload and the limits, and so does the
    namespace (`kv.salt.lossy`): stricter limits never meet blocks of laxer ones.
    """
    what = msgspec.json.encode([model, codec, payload_version, limits])
    return hashlib.sha256(what).hexdigest()[:_GATE_DIGITS]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    models: dict[str, dict[str, Verdict]]


# By the model's fingerprint, then by codec.
Verdicts = Mapping[str, Mapping[str, Verdict]]


def dump_verdicts(verdicts: Verdicts) -> bytes:
    """Verdicts as JSON, the same bytes for the same verdicts."""
    models = {model: dict(of_model) for model, of_model in verdicts.items()}
    plain = msgspec.json.encode(_File(FILE_VERSION, models), order="deterministic")
    return msgspec.json.format(plain, indent=2) + b"\n"


def load_verdicts(text: bytes) -> Verdicts:
    """The verdicts that `dump_verdicts` wrote. Raises CodecError for anything else."""
    try:
        found = msgspec.json.decode(text, type=_File)
    except msgspec.DecodeError as error:
        raise CodecError("verdicts", str(error), "measure the codecs again") from error
    if found.version != FILE_VERSION:
        raise CodecError(
            "verdicts", f"version {found.version}, not {FILE_VERSION}", "measure the codecs again"
        )
    return found.models
