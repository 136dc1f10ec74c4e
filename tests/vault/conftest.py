"""Vault shards and clients in real processes, without engines."""

import pytest

from workers import connector


@pytest.fixture(autouse=True, scope="session")
def loopback() -> None:
    """UCX reads it when the first client loads it."""
    connector.keep_on_network("127.0.0.1")
