import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.codecs.gate import (
    Comparison,
    Decision,
    GateLimits,
    GateReason,
    Verdict,
    compare,
    decide,
    dump_verdicts,
    gate_id,
    load_verdicts,
)
from kv.errors import CodecError

LIMITS = GateLimits()
PROMPTS = "set-1"
VERSION = 1
COUNTS = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
VERDICTS = st.builds(
    lambda counts, delta: Verdict(PROMPTS, VERSION, *counts, delta), COUNTS, st.floats(0, 100)
)


def verdict(agreed_tokens: int = 512, delta: float = 0.09, tokens: int = 512) -> Verdict:
    return Verdict(PROMPTS, VERSION, tokens, agreed_tokens, delta)


def decided(found: Verdict | None, lossless: bool = False) -> Decision:
    return decide(lossless, found, PROMPTS, VERSION, LIMITS)


def test_a_lossless_codec_needs_no_verdict() -> None:
    """There is nothing to measure of it."""
    assert decided(None, lossless=True).reason is GateReason.LOSSLESS


def test_a_codec_without_a_verdict_is_not_used() -> None:
    """Not measured is not good."""
    assert (decided(None).allowed, decided(None).reason) == (False, GateReason.UNMEASURED)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (verdict(), GateReason.PASSED),
        (verdict(tokens=255, agreed_tokens=255), GateReason.TOO_FEW_TOKENS),
        (verdict(tokens=1000, agreed_tokens=990), GateReason.PASSED),
        (verdict(tokens=1000, agreed_tokens=989), GateReason.TOKENS_DIFFER),
        (verdict(delta=0.25), GateReason.PASSED),
        (verdict(delta=0.2501), GateReason.LOGPROBS_DIFFER),
    ],
)
def test_limits_are_met_or_not(found: Verdict, reason: GateReason) -> None:
    """Each limit stops a codec on its own, and what equals it passes."""
    assert (decided(found).reason, decided(found).allowed) == (reason, reason is GateReason.PASSED)


@pytest.mark.parametrize(("prompts", "version"), [("set-2", VERSION), (PROMPTS, VERSION + 1)])
def test_an_old_verdict_does_not_count(prompts: str, version: int) -> None:
    """Another set of prompts, or another payload, was not what was measured."""
    decision = decide(False, verdict(), prompts, version, LIMITS)
    assert (decision.allowed, decision.reason) == (False, GateReason.OUTDATED)


@given(VERDICTS, st.integers(0, 100), st.floats(0, 10))
def test_a_worse_verdict_never_passes_where_a_better_one_fails(
    found: Verdict, fewer: int, more: float
) -> None:
    """The decision is monotonic in both figures."""
    worse = msgspec.structs.replace(
        found,
        agreed_tokens=max(0, found.agreed_tokens - fewer),
        max_logprob_delta=found.max_logprob_delta + more,
    )
    assert decided(found).allowed >= decided(worse).allowed


@given(st.dictionaries(st.text(), st.dictionaries(st.text(), VERDICTS, max_size=3), max_size=3))
def test_verdicts_are_kept_exactly(verdicts: dict[str, dict[str, Verdict]]) -> None:
    """What is written is read again, and the same verdicts are the same bytes."""
    text = dump_verdicts(verdicts)
    assert load_verdicts(text) == verdicts
    assert dump_verdicts(dict(reversed(verdicts.items()))) == text


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "models": {}}',
        b'{"version": 1, "models": {}, "more": 0}',
        dump_verdicts({"m": {"int8": verdict()}})[:-9],
        dump_verdicts({"m": {"int8": verdict()}}).replace(b"512", b"-1"),
        dump_verdicts({"m": {"int8": verdict()}}).replace(b"0.09", b"null"),
    ],
)
def test_a_file_that_says_something_else_is_refused(text: bytes) -> None:
    """A torn or foreign file is no permission."""
    with pytest.raises(CodecError, match="measure the codec"):
        load_verdicts(text)


@pytest.mark.parametrize(
    ("tokens", "agreed", "delta"),
    [(0, 0, 0.0), (10, 11, 0.0), (10, -1, 0.0), (10, 9, -0.1), (10, 9, math.nan), (9, 9, math.inf)],
)
def test_a_verdict_that_contradicts_itself_is_refused(
    tokens: int, agreed: int, delta: float
) -> None:
    """Nothing that was measured looks like that; a NaN would pass a comparison."""
    with pytest.raises(CodecError, match="measure the codec again"):
        verdict(agreed, delta, tokens)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_token_agreement": 0.0},
        {"min_token_agreement": 1.01},
        {"min_token_agreement": math.nan},
        {"max_logprob_delta": 0.0},
        {"max_logprob_delta": math.inf},
        {"max_logprob_delta": math.nan},
        {"min_tokens": 0},
    ],
)
def test_limits_that_limit_nothing_are_refused(limits: dict[str, float]) -> None:
    """A gate that cannot stop anything, or lets nothing through, is a mistake in config."""
    with pytest.raises(CodecError, match="gate"):
        GateLimits(**limits)


def test_a_gate_is_named_by_all_that_it_let_through() -> None:
    """Another model, codec, payload or limit is another gate, and so another namespace."""
    strict = GateLimits(max_logprob_delta=0.1)
    ids = {
        gate_id("model-a", "int8", 1, LIMITS),
        gate_id("model-b", "int8", 1, LIMITS),
        gate_id("model-a", "tq4", 1, LIMITS),
        gate_id("model-a", "int8", 2, LIMITS),
        gate_id("model-a", "int8", 1, strict),
    }
    assert len(ids) == 5
    assert gate_id("model-a", "int8", 1, GateLimits()) in ids


def test_answers_are_compared_up_to_the_first_token_that_differs() -> None:
    """What follows it answers another prompt: a token that is the same there by chance does not
    count, nor its logprob. That of the first difference does."""
    exact = [(5, -0.5), (6, -0.25), (7, -1.0)]
    assert compare(exact, exact) == Comparison(3, 0.0)
    assert compare(exact, [(5, -0.75), (6, -0.125), (7, -1.0)]) == Comparison(3, 0.25)
    assert compare(exact, [(5, -0.75), (9, -0.125), (7, -9.0)]) == Comparison(1, 0.25)
    assert compare(exact, [(4, -1.0), (6, -0.25), (7, -9.0)]) == Comparison(0, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        compare(exact, exact[:2])
