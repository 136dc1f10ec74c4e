import pickle

import pytest

from kv import errors

TREE = (
    errors.KVError,
    errors.BlockError,
    errors.CatalogueError,
    errors.CodecError,
    errors.CurveError,
    errors.DiskError,
    errors.DamagedBlockError,
    errors.LostSlotError,
    errors.PlanError,
    errors.SizeError,
    errors.TierError,
    errors.VaultError,
    errors.SegmentError,
    errors.SegmentFullError,
)


@pytest.mark.parametrize("kind", TREE)
def test_an_error_keeps_its_kind_and_message_between_processes(kind: type[errors.KVError]) -> None:
    """A pickled error comes back as its own class, with subject, numbers and remedy."""
    error = pickle.loads(pickle.dumps(kind("fit", "0 samples", "measure one")))
    assert type(error) is kind
    assert str(error) == "fit: 0 samples; measure one"


@pytest.mark.parametrize("kind", TREE)
def test_every_error_can_be_caught_as_one(kind: type[errors.KVError]) -> None:
    """The tree has one root."""
    assert issubclass(kind, errors.KVError)
