import re

from hypothesis import given
from hypothesis import strategies as st

from router.salt import tenant_salt

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
    assert re.fullmatch(r"[0-9a-f]{64}", made)


def test_without_the_secret_a_salt_cannot_be_guessed() -> None:
    """Another key gives another salt."""
    assert tenant_salt(b"key", "a", "b") != tenant_salt(b"other", "a", "b")
