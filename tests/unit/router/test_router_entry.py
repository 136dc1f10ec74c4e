"""Records as they are written down: all that a replay needs, and nothing that tells on anybody."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.audit import Entry, encode, read
from kv.block import chain, pack_tokens, root_key
from router.audit import Audit
from router.context import ServiceClass
from router.entry import Scribe
from router.pseudonyms import Pseudonyms
from tests.unit.router.audited import BLOCK_TOKENS, Clock, audit_of, footprint, remote, request

SECRET = bytes(range(32))


def scribe(clock: Clock, secret: bytes = SECRET) -> Scribe:
    return Scribe(Pseudonyms(secret), "smollm2", clock, Clock(5000.0))


def written(tenant: str = "acme", secret: bytes = SECRET, tokens: bytes | None = None) -> Entry:
    clock = Clock()
    asked = request(tenant=tenant, max_tokens=16)
    asked = asked if tokens is None else replace(asked, tokens=tokens)
    record = remote(clock, audit_of(clock), asked)
    return scribe(clock, secret).entry(record, footprint(asked))


def test_an_entry_has_all_that_a_replay_needs() -> None:
    """When it came, how long it was, its limits, its blocks' names, and what it got."""
    entry = written()
    assert entry.at_s == pytest.approx(5000.0 - 0.7)
    assert (entry.asked.prompt_tokens, entry.asked.block_tokens) == (10, BLOCK_TOKENS)
    assert (entry.asked.max_tokens, entry.asked.timeout_s) == (16, 30.0)
    assert len(entry.asked.names()) == 2  # not that of the last token
    assert (entry.answer_tokens, entry.outcome, entry.service_class) == (3, "stop", "batch")


def test_an_entry_has_what_came_of_the_plan() -> None:
    """TTFT, gaps, seconds, tokens and bytes, as the record has them."""
    entry = written()
    assert entry.ttft_s == pytest.approx(0.4)
    assert (entry.itl_mean_s, entry.itl_max_s) == (pytest.approx(0.1), pytest.approx(0.15))
    assert entry.total_s == pytest.approx(0.7)
    assert entry.error_ratio is None  # of a batch request
    urgent = msgspec.structs.replace(entry, service_class=ServiceClass.INTERACTIVE)
    assert urgent.error_ratio == pytest.approx(0.8)
    assert entry.engine_s == pytest.approx(0.23)
    assert entry.sources["decode"] == {"computed": 1, "received": 9}
    assert entry.moved_bytes == {"decode": {"received": 9000}}
    assert [part.action for part in entry.parts][-1] == "step"
    assert [planned.after_s for planned in entry.plans] == [0.0]
    assert list(read([encode(entry)], pytest.fail)) == [entry]


def test_a_wait_for_a_turn_is_told_apart() -> None:
    """It ended before the plan was made, from where all other seconds count."""
    clock = Clock()
    plan = remote(clock, audit_of(clock), request()).plan
    record = audit_of(clock).open(request(), plan, 100.0, waited_s=12.5)
    assert scribe(clock).entry(record).waited_s == 12.5
    assert written().waited_s == 0.0


def test_an_open_record_is_running() -> None:
    """An operator may ask for one that is under way."""
    clock = Clock()
    record = audit_of(clock).open(request(), remote(clock, audit_of(clock), request()).plan, 100.0)
    entry = scribe(clock).entry(record)
    assert (entry.outcome, entry.total_s, entry.ttft_s) == ("running", None, None)
    assert entry.asked.blocks == b""


token_ids = st.integers(0, 2**32 - 1)


@given(st.lists(st.tuples(token_ids, token_ids), min_size=1, max_size=60))
def test_a_line_depends_on_tokens_by_its_blocks_names_alone(pairs: list[tuple[int, int]]) -> None:
    """Two prompts of one length differ in nothing else, and the names are not the catalogue's."""
    one, other = (written(tokens=pack_tokens(list(each))) for each in zip(*pairs, strict=True))
    bare = [msgspec.structs.replace(each.asked, blocks=b"") for each in (one, other)]
    assert msgspec.structs.replace(one, asked=bare[0]) == msgspec.structs.replace(
        other, asked=bare[1]
    )
    for key in chain(root_key("salt"), pack_tokens([first for first, _ in pairs]), BLOCK_TOKENS):
        assert not {key[:8], key[8:]} & set(one.asked.names())


def test_no_name_that_a_client_gave_is_in_a_line() -> None:
    """Neither the tenant's nor the session's, nor the salt."""
    line = encode(written("umbrella"))
    assert not any(name in line for name in (b"umbrella", b"conversation-7", b"salt"))


def test_a_closed_record_keeps_no_block_names() -> None:
    """A thousand are kept in memory for operators, who need none."""
    clock = Clock()
    audit: Audit = audit_of(clock)
    record = remote(clock, audit, request())
    assert record.footprint.keys == ()
    assert record.footprint.block_tokens == BLOCK_TOKENS


prompts = st.lists(st.integers(0, 1), max_size=40).map(tuple)


@given(prompts, prompts)
def test_blocks_share_names_exactly_as_far_as_prompts_are_alike(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """A simulator that knows nothing but the names finds the hits that there were."""
    pseudonyms = Pseudonyms(SECRET)

    def names(tokens: tuple[int, ...]) -> list[bytes]:
        keys = chain(root_key(None), pack_tokens(tokens), BLOCK_TOKENS)
        joined = pseudonyms.blocks(keys)
        return [joined[at : at + 8] for at in range(0, len(joined), 8)]

    both = list(zip(names(one), names(other), strict=False))
    alike = [one[: n * BLOCK_TOKENS] == other[: n * BLOCK_TOKENS] for n in range(1, len(both) + 1)]
    assert [a == b for a, b in both] == alike
    assert len(names(one)) == len(one) // BLOCK_TOKENS


def test_names_are_of_one_run_alone() -> None:
    """Another secret names everything otherwise; the same one, in another process, alike."""
    first, again, other = written(), written(), written(secret=b"another" * 5)
    assert (first.capture, first.tenant, first.session) == (
        again.capture,
        again.tenant,
        again.session,
    )
    assert first.asked == again.asked
    assert first.capture != other.capture
    assert first.tenant != other.tenant
    assert first.session != other.session
    assert not set(first.asked.names()) & set(other.asked.names())


def test_tenants_are_told_apart_and_their_sessions_too() -> None:
    """The same `prompt_cache_key` of two tenants is two sessions."""
    acme, umbrella = written("acme"), written("umbrella")
    assert acme.tenant != umbrella.tenant
    assert acme.session != umbrella.session
    assert written("a\ud800").tenant != acme.tenant  # names come from files, sessions from JSON


def test_without_a_session_there_is_none() -> None:
    """Nobody is put into a session of nobody."""
    assert Pseudonyms(SECRET).session(None) is None
    assert Pseudonyms(SECRET).blocks([]) == b""
