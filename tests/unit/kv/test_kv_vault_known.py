"""What a replica tells of a vault, held against plain sets."""

from hypothesis import example, given
from hypothesis import strategies as st

from kv.vault.known import Known

KEYS = st.lists(st.binary(min_size=1, max_size=1), max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), KEYS, st.sampled_from("ab")),
        st.tuples(st.just("drop"), KEYS, st.just("")),
        st.tuples(st.just("forget"), st.just([]), st.sampled_from("ab")),
        st.tuples(st.just("take"), st.just([]), st.just("")),
    ),
    max_size=30,
)


@example([("add", [b"1"], "a"), ("take", [], ""), ("drop", [b"1"], ""), ("add", [b"1"], "a")])
@given(STEPS)
def test_what_is_told_adds_up_to_what_is_known(steps: list[tuple[str, list[bytes], str]]) -> None:
    """Whoever follows what was told holds exactly what is known; nothing comes twice, and nothing
    goes that did not come."""
    known, told = Known(), set[bytes]()
    expected: dict[bytes, str] = {}
    for what, keys, tag in [*steps, ("take", [], "")]:
        if what == "add":
            known.add(keys, tag)
            expected |= dict.fromkeys(keys, tag)
        elif what == "drop":
            known.drop(keys)
            expected = {key: of for key, of in expected.items() if key not in keys}
        elif what == "forget":
            known.forget({tag})
            expected = {key: of for key, of in expected.items() if of != tag}
        else:
            stored, removed = known.take()
            assert not set(stored) & told
            assert set(removed) <= told
            told = (told | set(stored)) - set(removed)
            assert told == set(expected)
    assert len(known) == len(expected)


def test_the_oldest_is_forgotten_first() -> None:
    """What was seen again is young; who follows is told what went."""
    known = Known(most=2)
    known.add([b"1", b"2"], "")
    assert known.take() == ([b"1", b"2"], [])
    known.add([b"1", b"3"], "")
    assert known.take() == ([b"3"], [b"2"])
