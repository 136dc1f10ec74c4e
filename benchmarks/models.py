"""The model that is measured."""

from functools import cache
from pathlib import Path

from cluster.config import cache_dir
from cluster.model import ensure_default_model
from tests.tiny_model import cached_tiny_model


@cache
def model(quick: bool = False) -> Path:
    """The folder of the default model; for smoke runs, of a tiny one with its tokenizer."""
    default = ensure_default_model(cache_dir())
    return cached_tiny_model(cache_dir(), default) if quick else default
