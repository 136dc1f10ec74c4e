import pytest

from router.admission import Admission
from router.errors import OverloadedError


def test_as_many_enter_as_are_allowed() -> None:
    """The one past the limit is refused with both numbers, and takes no place."""
    admission = Admission(2)
    with admission.admit(), admission.admit():
        with pytest.raises(OverloadedError, match="2 requests in flight, 2 allowed"):
            admission.admit().__enter__()
        assert admission.held == 2
    assert admission.held == 0


def test_a_request_that_fails_gives_its_place_back() -> None:
    """Whatever ends a request, its place is free."""
    admission = Admission(1)
    for error in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), admission.admit():
            raise error
    assert admission.held == 0


def test_a_call_of_several_requests_is_checked_as_a_whole() -> None:
    """n=3 in one call is refused before any of them starts."""
    admission = Admission(3)
    with admission.admit():
        admission.check(2)
        with pytest.raises(OverloadedError):
            admission.check(3)
        assert admission.held == 1
