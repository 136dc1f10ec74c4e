"""A model's config.json, found without a network."""

import json
from pathlib import Path
from typing import Any

from cluster.config import cache_dir
from cluster.errors import ModelConfigError
from cluster.model import MODEL_NAME

# The longest config that is published lists each layer's quantisation, in a few hundred KB.
MAX_BYTES = 16 << 20


def read(model: str) -> tuple[Path, Any]:
    """The path and the parsed JSON of a model's config.

    `model` is a folder, a file, "default", or a hub name whose files an earlier download left in
    the hub's cache. Raises `ModelConfigError`.
    """
    path = _find(model)
    try:
        return path, json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(str(path), "no JSON text, give a config.json") from error


def _find(model: str) -> Path:
    if model == "default":
        return cache_dir() / "models" / MODEL_NAME / "config.json"
    path = Path(model)
    try:
        if path.is_dir():
            return path / "config.json"
        if path.is_file():
            return path
    except OSError as error:
        raise ModelConfigError(model[:200], error.strerror or "not readable") from error
    return _downloaded(model) or path


def _downloaded(name: str) -> Path | None:
    """The config of a hub name in the hub's cache of this machine."""
    # 0.1 s to import, which paths do without.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would block
            raise ModelConfigError(str(path)[:200], _absent(path))
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ModelConfigError(str(path)[:200], reason or "no path") from error
    if len(text) > MAX_BYTES:
        raise ModelConfigError(str(path), f"more than {MAX_BYTES >> 20} MiB, give a config.json")
    return text


def _absent(path: Path) -> str:
    if path == cache_dir() / "models" / MODEL_NAME / "config.json":
        return "the default model is not here yet; `make setup` gets it"
    if path.name == "config.json" and path.parent.is_dir():
        return "the folder has no config.json"
    return "no such file; give a model's folder or config.json"
