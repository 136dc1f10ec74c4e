"""What a machine that cannot make links is told."""

import os

import pytest

from benchmarks.links import network
from benchmarks.links.network import LinkRefusedError, check


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the packages that bring them."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LinkRefusedError, match="ip, tc, nsenter, unshare: install iproute2"):
        check()


def test_a_user_who_may_not_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is tried, with the command that lets him."""
    monkeypatch.setattr(network, "_TOOLS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LinkRefusedError, match="unshare --user --map-root-user"):
        check()
