import pytest

from router.admission import Admission
from router.context import Notes
from router.errors import OverloadedError, TooManyError


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


def test_a_reserved_place_is_nobody_else_s() -> None:
    """Between a call's check and the start of its requests others find the ingress full; the
    requests take over what was reserved, and no more than that."""
    admission, notes = Admission(3), Notes()
    admission.reserve(2, notes)
    admission.reserve(2, notes)  # vLLM checks a call more than once
    assert admission.held == 2
    with pytest.raises(OverloadedError):
        admission.reserve(2, Notes())
    with admission.admit(), admission.admit(notes), admission.admit(notes):
        assert (admission.held, notes.reserved) == (3, 0)
        with pytest.raises(OverloadedError):
            admission.admit(notes).__enter__()
    admission.release(notes)
    assert admission.held == 0


def test_a_call_that_ends_early_gives_its_places_back() -> None:
    """Whether none or one of its requests has begun, and once only."""
    admission, notes = Admission(3), Notes()
    admission.reserve(3, notes)
    with admission.admit(notes):
        for _ in range(2):
            admission.release(notes)
            assert admission.held == 1
    assert admission.held == 0
    with pytest.raises(TooManyError):
        admission.reserve(4, notes)
    assert (admission.held, notes.reserved) == (0, 0)
