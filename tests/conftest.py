"""Fixtures that more than one folder of tests uses."""

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cluster.model import ensure_default_model
from tests.tiny_model import cached_tiny_model

# Machines that are shared are slow now and then; that is no fault of an example.
settings.register_profile("breakeven", deadline=None)
settings.load_profile("breakeven")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def ucx_of_a_module() -> Iterator[None]:
    """What a test in this process told UCX is not for the processes that later ones start."""
    before = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    yield
    for name in [name for name in os.environ if name.startswith("UCX_")]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where models are kept between runs; make sets the variable."""
    return Path(os.environ.get("BREAKEVEN_CACHE") or ROOT / ".cache")


@pytest.fixture(scope="session")
def default_model(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return ensure_default_model(cache_dir)


@pytest.fixture(scope="session")
def tiny_model(cache_dir: Path, default_model: Path) -> Path:
    """A random-weight Llama with the default model's tokenizer."""
    return cached_tiny_model(cache_dir, default_model)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    # Below the range that the kernel gives out: whoever starts between the pick and its use, and a
    # cluster starts dozens of sockets, may be given it otherwise.
    def pick() -> int:
        while True:
            port = random.randrange(20_000, 32_000)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port

    return pick
