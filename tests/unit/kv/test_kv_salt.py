from itertools import product

from hypothesis import assume, given
from hypothesis import strategies as st

from kv.salt import UNTAGGED, lossy, tag_of, tagged

SALTS = st.none() | st.text() | st.builds(tagged, st.text("0123456789abcdef"), st.text())


@given(SALTS, st.text(), st.text())
def test_a_lossy_salt_keeps_its_tenants_tag(salt: str | None, codec: str, gate: str) -> None:
    """A tenant's lossy blocks are found, and erased, with its others."""
    assert tag_of(lossy(salt, codec, gate)) == tag_of(salt)


def test_lossy_blocks_without_a_salt_stay_untagged() -> None:
    """Who shares the one namespace shares its lossy ones too."""
    assert tag_of(lossy(None, "int8", "g")) == UNTAGGED


def test_a_lossy_request_has_a_namespace_of_its_own() -> None:
    """Salt, codec and gate each make another name, no salt and an empty one differ, and none is the
    lossless one. Fields do not run into one another."""
    salts = (None, "", "a", "ab", "t.a")
    fields = ("", "int8", "int8g", "g")
    named = [lossy(*each) for each in product(salts, fields, fields)]
    assert len(set(named)) == len(named)
    assert not set(named) & set(salts)


@given(SALTS, SALTS)
def test_lossy_names_tell_salts_apart(one: str | None, other: str | None) -> None:
    """Two tenants' lossy blocks are as separate as their lossless ones."""
    assume(one != other)
    assert lossy(one, "int8", "g") != lossy(other, "int8", "g")


def test_a_lossy_name_stays_what_it_is() -> None:
    """Stored blocks are found by it after a restart."""
    assert lossy("tag.digest", "int8", "0" * 16).startswith("tag.")
    assert lossy(None, "int8", "0" * 16) == lossy(None, "int8", "0" * 16)
