"""Links between namespaces, where the machine can make them."""

import pytest

from benchmarks.links.network import LinkRefusedError, check


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    """Nothing here can run without root and iproute2; what is missing is the reason."""
    try:
        check()
    except LinkRefusedError as refusal:
        pytest.skip(str(refusal))
