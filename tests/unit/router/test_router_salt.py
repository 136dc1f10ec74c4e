import re

from hypothesis import given
from hypothesis import strategies as st

from kv.codecs.codec import CodecName
from kv.salt import UNTAGGED, lossy, tag_of, tagged
from router.salt import Salter, tenant_salt, tenant_tag

names = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=6)
salts = st.text(alphabet=st.characters(), max_size=6)


@given(st.lists(st.tuples(names, salts), min_size=2, max_size=2, unique=True))
def test_two_tenants_never_share_a_salt(pairs: list[tuple[str, str]]) -> None:
    """Different (tenant, salt) pairs give different salts, even where they concatenate alike."""
    (tenant, salt), (other_tenant, other_salt) = pairs
    assert tenant_salt(b"key", tenant, salt) != tenant_salt(b"key", other_tenant, other_salt)


def test_where_a_tenant_ends_is_part_of_the_salt() -> None:
    """No tenant can reach another's by choosing a salt that begins with the rest of its name."""
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("ab\0", "c"), ("ab", "\0c")]
    assert len({tenant_salt(b"key", *pair) for pair in pairs}) == len(pairs)


@given(names, salts)
def test_a_salt_is_repeatable_and_visible_ascii(tenant: str, salt: str) -> None:
    """The same pair names the same blocks again; lone surrogates are no error."""
    made = tenant_salt(b"key", tenant, salt)
    assert made == tenant_salt(b"key", tenant, salt)
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{64}", made)


def test_without_the_secret_a_salt_cannot_be_guessed() -> None:
    """Another key gives another salt."""
    assert tenant_salt(b"key", "a", "b") != tenant_salt(b"other", "a", "b")


@given(names, salts, st.none() | salts, st.booleans())
def test_all_salts_of_a_tenant_carry_a_tag_by_which_they_are_forgotten(
    tenant: str, salt: str, other: str | None, separate: bool
) -> None:
    """Whatever salts its clients choose, or none."""
    salter = Salter(b"key", separate)
    assert tag_of(salter.salt(tenant, salt)) in salter.tags(tenant)
    if separate or tenant == "default":  # without keys there is no other tenant
        assert tag_of(salter.salt(tenant, other)) in salter.tags(tenant)


@given(names, names, salts)
def test_forgetting_a_tenant_finds_no_other_s_blocks(one: str, two: str, salt: str) -> None:
    """A client cannot choose a salt that looks like another tenant's."""
    salter = Salter(b"key", separate=True)
    if one != two:
        assert not set(salter.tags(one)) & set(salter.tags(two))
        forged = tagged(tenant_tag(b"key", one), salt)
        assert tag_of(salter.salt(two, forged)) not in salter.tags(one)
    assert UNTAGGED not in salter.tags(one)


@given(names, st.none() | salts, st.booleans())
def test_a_lossy_request_is_named_apart(tenant: str, salt: str | None, separate: bool) -> None:
    """By the codec and the gate that it passed, beside its exact name and under the same tag."""
    salter = Salter(b"key", separate, {CodecName.INT8: "gate"})
    exact = salter.salt(tenant, salt)
    rounded = salter.salt(tenant, salt, CodecName.INT8)
    assert rounded == lossy(exact, "int8", "gate") != exact
    assert tag_of(rounded) == tag_of(exact)


@given(names, st.none() | salts, st.booleans())
def test_a_codec_without_a_gate_changes_no_name(
    tenant: str, salt: str | None, separate: bool
) -> None:
    """Who allows a codec that the model may not use is served exactly, from exact blocks."""
    salter = Salter(b"key", separate, {CodecName.INT8: "gate"})
    for codec in (CodecName.TQ4, CodecName.RAW, None):
        assert salter.salt(tenant, salt, codec) == salter.salt(tenant, salt)
        assert salter.gate(codec) is None


def test_a_tag_needs_the_secret() -> None:
    """Another key gives another tag, so that workers cannot try tenants' names."""
    assert tenant_tag(b"key", "acme") != tenant_tag(b"other", "acme")


@given(st.text(alphabet=st.characters(exclude_characters="."), min_size=1), salts)
def test_a_tag_is_read_back_from_a_salt(tag: str, digest: str) -> None:
    """Up to the first full stop; a salt without one is nobody's."""
    assert tag_of(tagged(tag, digest)) == tag
    assert tag_of(tag) == tag_of(None) == UNTAGGED
