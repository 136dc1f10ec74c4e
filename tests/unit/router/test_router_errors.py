import pickle

import pytest

from router import errors
from router.errors import (
    AccessError,
    DeadlineError,
    KeyFileError,
    NoReplicaError,
    OrderError,
    OverloadedError,
    RateLimitError,
    RequestLostError,
    RoomFullError,
    RouterError,
    TooManyError,
    UnservableError,
)
from router.limits import Account, Limits, judge

EACH = [
    NoReplicaError(1, 0),
    OverloadedError(256, 256),
    RoomFullError(256, 256),
    RateLimitError("acme", judge(Account(8), Limits(max_requests=8), 0.0)),
    TooManyError(300, 256),
    UnservableError("r1", "a number in it has more than 64 bits"),
    AccessError("API key", True),
    KeyFileError("keys.yaml", "is no YAML"),
    OrderError("GCS does not answer"),
    DeadlineError("r1", 1.5),
    RequestLostError("r1", "4 plans failed"),
]


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: RouterError) -> None:
    """Kind, message and fields come back in another process."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_has_a_status_and_is_tried_here() -> None:
    """An error added to the tree needs its line in the table."""
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, RouterError) and kind is not RouterError
    }
    assert kinds == set(errors.STATUS) == {type(error) for error in EACH}
