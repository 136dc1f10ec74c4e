"""Lenders and readers over real sockets and NIXL, without engines."""

import pytest

from workers import connector


@pytest.fixture(autouse=True, scope="session")
def loopback() -> None:
    """UCX reads it when the first of them loads it."""
    connector.keep_on_network("127.0.0.1")
