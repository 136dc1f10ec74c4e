"""What a stored block's bytes depend on, as one name.

A block's hash says which tokens it holds. Everything else that decides its bytes (the model, its
dtype, the page's layout, the machine's instruction set) goes into the fingerprint: a tier finds
only blocks that were stored under its own.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

_DIGITS = 24
# What these engine options decide is when tokens are computed, not what comes out.
_HARMLESS = frozenset(
    {
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "enable_auto_tool_choice",
        "tool_call_parser",
        "reasoning_parser",
        "chat_template",
    }
)

# With a model's own code, which may be of the folder too (`trust_remote_code`).
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"})


def fingerprint(facts: Mapping[str, object]) -> str:
    """96 bits of a SHA-256 over named facts, as hex; the order of names does not matter."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def engine_facts(options: Mapping[str, object]) -> dict[str, object]:
    """The engine options that may change a block's bytes. What is not known to be harmless
    counts: a needless recompute costs less than a wrong page."""
    return {name: value for name, value in options.items() if name not in _HARMLESS}


def folder_identity(folder: Path) -> str:
    """A model folder as it is now: its configuration, and names, sizes and times of its weights.

    Reading gigabytes of weights would take longer than loading them. Sizes are alike for all
    checkpoints of one architecture, and a copy may keep the times of contents (`rsync -t`, images
    whose times are all one); the time of the file's own last change is the file system's to set.
    """
    config = folder / "config.json"
    content = hashlib.sha256(config.read_bytes() if config.is_file() else b"").hexdigest()
    return fingerprint({"config": content, "weights": list(_weights(folder))})


def snapshot_identity(name: str, commit: str | None) -> str:
    """A model of a hub at one commit. An unknown commit names nothing that could be found
    again: what was stored under it is of no use to another process."""
    return f"{name}@{commit or secrets.token_hex(16)}"


def _weights(folder: Path) -> Iterable[tuple[str, int, int, int]]:
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            status = path.stat()
            yield path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns
