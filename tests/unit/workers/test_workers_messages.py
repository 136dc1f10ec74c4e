import contextlib
import pickle
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.catalogue import Tier
from kv.plan import Hints
from workers import errors, messages
from workers.messages import (
    Abort,
    Blocks,
    Delta,
    FetchLoad,
    Forget,
    Forgotten,
    Hello,
    Load,
    LossyLoad,
    Release,
    Replica,
    Reply,
    Request,
    Reset,
    Resync,
    Role,
    Sources,
    Spent,
    Step,
    Submit,
    TierLoad,
    Totals,
    Welcome,
    decode_reply,
    decode_request,
    encode,
)

text, binary = st.text(max_size=8), st.binary(max_size=40)
counts = st.integers(0, 2**40)
seconds = st.floats(0, 1e6)
handoffs = st.dictionaries(text, st.none() | text | counts | st.lists(counts, max_size=3))
roles = st.sampled_from(Role)
sources = st.builds(Sources, *[counts] * len(Sources.__struct_fields__))
spent = st.builds(Spent, seconds, seconds, seconds, counts, counts)
tiers = st.sampled_from(Tier)
hints = st.builds(
    Hints,
    st.none() | counts,
    st.lists(tiers, max_size=3).map(tuple),
    st.none() | seconds,
    st.none() | text,
    counts,
    seconds,
)
deltas = st.builds(
    Delta,
    request_id=text,
    token_ids=st.lists(counts, max_size=4),
    finish_reason=st.none() | text,
    stop_reason=st.none() | counts | text,
    sources=st.none() | sources,
    handoff=st.none() | handoffs,
    extras=st.none() | st.lists(binary, max_size=2),
    error=st.none() | text,
    spent=st.none() | spent,
)
seen = st.lists(st.tuples(counts, seconds), max_size=3).map(tuple)
lossy = st.builds(LossyLoad, seconds, seconds, counts, seen, seconds)
tier_loads = st.builds(TierLoad, counts, counts, seconds, seconds, counts, st.none() | lossy, seen)
totals = st.builds(Totals, **dict.fromkeys(["generated_tokens", "transfers"], counts))
samples = st.lists(st.tuples(counts, counts, seconds), max_size=3).map(tuple)
replicas = st.builds(
    Replica,
    **dict.fromkeys(["name", "epoch", "address", "node", "model"], text),
    **dict.fromkeys(["pid", "block_tokens", "kv_bytes_per_token", "kv_blocks"], counts),
    role=roles,
    max_num_seqs=counts,
    prefill_samples=samples,
    step_s=seconds,
)
REQUESTS = {
    Hello: st.builds(Hello, text),
    Submit: st.builds(
        Submit, text, roles, binary, binary, st.none() | handoffs, binary, st.none() | hints
    ),
    Abort: st.builds(Abort, st.lists(text, max_size=3)),
    Release: st.builds(Release, text, handoffs),
    Resync: st.builds(Resync),
    Reset: st.builds(Reset),
    Forget: st.builds(Forget, text, st.lists(text, max_size=2).map(tuple)),
}
REPLIES = {
    Welcome: st.builds(Welcome, replicas),
    Step: st.builds(Step, st.lists(deltas, max_size=3)),
    Load: st.builds(
        Load,
        counts,
        counts,
        counts,
        counts,
        counts,
        seconds,
        totals,
        st.lists(text).map(tuple),
        st.booleans(),
        st.dictionaries(tiers, tier_loads),
        peer=st.none() | st.builds(FetchLoad, seconds, seconds, counts, seen),
    ),
    Blocks: st.builds(Blocks, counts, binary, binary, st.booleans(), seconds, tiers),
    Forgotten: st.builds(Forgotten, text, counts, counts),
}


def test_every_message_is_tried() -> None:
    """A message added to the protocol needs a strategy here."""
    assert set(REQUESTS) == set(get_args(Request))
    assert set(REPLIES) == set(get_args(Reply))


@given(st.one_of(*REQUESTS.values()))
def test_what_an_ingress_says_arrives_as_it_was(message: Request) -> None:
    """Encoding and decoding a request gives an equal one."""
    assert decode_request(encode(message), "peer") == message


@given(st.one_of(*REPLIES.values()))
def test_what_a_replica_says_arrives_as_it_was(message: Reply) -> None:
    """Encoding and decoding a reply gives an equal one."""
    assert decode_reply(encode(message), "peer") == message


@given(st.binary(max_size=60) | st.one_of(*REQUESTS.values(), *REPLIES.values()).map(encode))
def test_other_bytes_are_a_wire_error(frame: bytes) -> None:
    """Whatever arrives is a message of that direction or a WireError, nothing else."""
    for decode, known in ((decode_request, REQUESTS), (decode_reply, REPLIES)):
        with contextlib.suppress(errors.WireError):
            assert type(decode(frame, "peer-7")) in known


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x80", encode(Hello("a"))[:-1]])
def test_garbage_names_its_peer_and_a_remedy(frame: bytes) -> None:
    """The error says who sent it and what to look at."""
    with pytest.raises(errors.WireError, match=r"peer-7: unreadable .* one version"):
        decode_request(frame, "peer-7")


def test_a_reply_is_no_request() -> None:
    """A message sent the wrong way is refused, not misread."""
    with pytest.raises(errors.WireError):
        decode_request(encode(Load()), "peer")


TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.WorkerError)
]


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not errors.WorkerError])
def test_an_error_survives_pickling(kind: type[errors.WorkerError]) -> None:
    """Kind, message and both fields come back in another process."""
    error = kind("decode-3", "8 blocks wanted")  # type: ignore[call-arg]
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert "decode-3" in str(error)
    assert "8 blocks wanted" in str(error)


def test_the_version_is_that_of_this_shape() -> None:
    """A replica announces the version it speaks without being told."""
    assert Replica.__struct_defaults__[-1] == messages.WIRE_VERSION


def test_where_tokens_came_from_adds_up_to_the_prompt() -> None:
    """By source, without those that gave none."""
    sources = Sources(100, 20, 30, 0, host_tokens=40, disk_tokens=10)
    assert sources.by_source() == {"computed": 20, "device": 30, "host": 40, "disk": 10}
    assert sum(sources.by_source().values()) == sources.prompt_tokens
    assert Sources(0, 0, 0, 0).by_source() == {}
