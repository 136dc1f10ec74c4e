"""What a first token really took, out of what engines and the ingress know."""

from dataclasses import replace

import pytest

from kv.parts import Action
from kv.plan import Plan, Shape
from router import actual
from router.audit import Record
from tests.unit.router.audited import LOCAL, REMOTE, Clock, audit_of, footprint, remote, request
from workers.messages import Delta, Sources, Spent


def shown(record: Record) -> list[tuple[str, str, float, float]]:
    return [
        (part.action, part.replica, round(part.start_s, 9), round(part.seconds, 9))
        for part in actual.parts(record)
    ]


def opened(plan: Plan, clock: Clock) -> Record:
    asked = request()
    return audit_of(clock).open(asked, plan, 99.5, footprint(asked))


def test_parts_of_a_handoff_add_up_to_the_first_token() -> None:
    """P's told seconds, what they leave, D's queue, then the handoff up to D's first step."""
    clock = Clock()
    record = remote(clock, audit_of(clock), request())
    assert shown(record) == [
        ("queue", "prefill-0", 0.0, 0.05),
        ("compute", "prefill-0", 0.05, 0.2),
        ("rest", "prefill-0", 0.25, 0.05),
        ("queue", "decode-0", 0.3, 0.02),
        ("handoff", "decode-0", 0.32, 0.05),
        ("step", "decode-0", 0.37, 0.03),
    ]
    assert actual.parts(record)[-1].end_s == pytest.approx(record.ttft_s)


def test_without_a_word_from_the_engines_legs_are_told_whole() -> None:
    """A replica that tells nothing of its time: P's leg is one part, D's is the handoff."""
    clock = Clock()
    record = remote(clock, audit_of(clock), request())
    record.prefill_spent = record.decode_spent = None
    assert shown(record) == [
        ("rest", "prefill-0", 0.0, 0.3),
        ("handoff", "decode-0", 0.3, 0.1),
    ]
    assert actual.engine_s(record) is None


def test_parts_begin_with_the_plan_and_not_with_the_request() -> None:
    """Planning itself is no replica's part."""
    clock = Clock()
    record = opened(LOCAL, clock)
    record.decode_spent = Spent(0.1, 0.2, 0.3, loaded_bytes=5)
    record.first_token_at = 100.7
    assert shown(record) == [
        ("queue", "decode-0", 0.0, 0.1),
        ("fetch", "decode-0", 0.1, 0.2),
        ("compute", "decode-0", 0.3, 0.3),
        ("rest", "decode-0", 0.6, 0.1),
    ]


def test_a_split_s_replicas_begin_together() -> None:
    """D fetches the tail while P computes the head."""
    clock = Clock()
    record = opened(replace(REMOTE, shape=Shape.SPLIT), clock)
    record.prefill_spent, record.decode_spent = Spent(0.0, 0.0, 0.3), Spent(0.0, 0.4, 0.1)
    record.first_token_at = 100.5
    assert shown(record) == [
        ("compute", "prefill-0", 0.0, 0.3),
        ("fetch", "decode-0", 0.0, 0.4),
        ("compute", "decode-0", 0.4, 0.1),
    ]


def test_clocks_that_disagree_make_no_negative_part() -> None:
    """An engine that tells of more time than passed here leaves no rest."""
    record = opened(LOCAL, Clock())
    record.decode_spent = Spent(0.4, 0.0, 0.4)
    record.first_token_at = 100.5
    assert [(action, seconds) for action, _, _, seconds in shown(record)] == [
        (Action.QUEUE, 0.4),
        (Action.COMPUTE, 0.4),
    ]


def test_a_request_that_got_no_token_has_the_parts_that_ended() -> None:
    """P's of a request that D never answered, and none of one that P never finished."""
    record = opened(REMOTE, Clock())
    assert shown(record) == []
    record.prefill_spent, record.handed_off_at = Spent(0.0, 0.0, 0.25), 100.25
    assert shown(record) == [("compute", "prefill-0", 0.0, 0.25)]


def test_a_stream_that_goes_on_elsewhere_has_no_parts() -> None:
    """Its first token came under the plan that failed later; what failed plans computed counts."""
    clock = Clock()
    audit = audit_of(clock)
    record = audit.open(request(), REMOTE, 100.0)
    record.prefill_spent = Spent(0.0, 0.0, 0.25)
    clock.now_s = 100.5
    audit.delta(record, Delta("r1", [1]))
    clock.now_s = 101.0
    audit.plan(record, LOCAL, 0.001)
    assert record.handed_off_at is record.prefill_spent is None
    assert actual.parts(record) == ()
    assert actual.engine_s(record) == 0.25
    record.decode_spent = Spent(0.0, 0.0, 0.5)
    assert actual.engine_s(record) == 0.75


def test_moved_bytes_are_those_of_tokens_that_were_elsewhere() -> None:
    """A device hit moves nothing, and neither does what is computed."""
    clock = Clock()
    record = remote(clock, audit_of(clock), request())
    assert actual.moved_bytes(record) == {"decode": {"received": 9000}}
    record.prefill_sources = Sources(10, 1, 4, 0, host_tokens=3, vault_tokens=2)
    assert actual.moved_bytes(record)["prefill"] == {"host": 3000, "vault": 2000}
