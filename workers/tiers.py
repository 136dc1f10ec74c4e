"""Tiers behind an engine's paged KV: what may be set, and what vLLM is told of it.

The connector takes KV from one source a request. A request with a handoff takes nothing from the
tiers, and one without takes what its plan's hints let it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kv.catalogue import Tier
from kv.fingerprint import engine_facts, fingerprint, folder_identity, snapshot_identity
from kv.plan import Hints
from kv.promoted import DEADLINE

# Whose statistics are the tiers' (`kv.offload`).
TIERED_CONNECTOR = "TieredConnector"

# Shared memory through which disk blocks pass where no host tier is set.
STAGING_BYTES = 268_435_456

# Requests that neither read the tiers nor leave anything there (`workers.probe`).
NO_TIERS: dict[str, Any] = {"max_load_tokens": 0, "max_offload_tokens": 0}


# How vLLM tells the tiers behind the host tier apart.
_MATCHERS = {
    Tier.DISK: {"medium": "STORAGE", "locality": "LOCAL"},
    Tier.PEER: {"medium": "CPU", "locality": "REMOTE"},
    Tier.VAULT: {"medium": "STORAGE", "locality": "REMOTE"},
}


class HostTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shared memory of one replica."""

    bytes: Annotated[int, Meta(ge=1)]


class DiskTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of one replica below `path`."""

    path: Annotated[str, Meta(min_length=1)]
    bytes: Annotated[int, Meta(ge=1)]


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where evicted blocks stay; nothing is kept where neither is set."""

    host: HostTier | None = None
    disk: DiskTier | None = None

    def __bool__(self) -> bool:
        return self.host is not None or self.disk is not None


def with_tiers(transfer: Mapping[str, Any], tiers: Tiers, identity: str) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` of a replica that has tiers beside its handoffs.

    `transfer` is the one for handoffs alone; `identity` names the model and its options for
    blocks that outlive the process.
    """
    nixl = {name: value for name, value in transfer.items() if name != "engine_id"}
    offload = {
        "kv_connector": TIERED_CONNECTOR,
        "kv_connector_module_path": "kv.offload",
        "kv_role": "kv_both",
        "kv_load_failure_policy": transfer["kv_load_failure_policy"],
        "kv_connector_extra_config": _offloading(tiers, identity),
    }
    return {
        **transfer,
        "kv_connector": "MultiConnector",
        # What else reads the transfer's settings finds them where they were.
        "kv_connector_extra_config": {
            **transfer["kv_connector_extra_config"],
            "connectors": [nixl, offload],
        },
    }


def model_identity(model: str, options: Mapping[str, object]) -> str:
    """The model, its revision, and the engine options that may change a block's bytes."""
    folder = Path(model)
    if folder.is_dir():
        name = folder_identity(folder)
    else:
        name = snapshot_identity(model, _hub_commit(model, options.get("revision")))
    return fingerprint({"model": name, "options": engine_facts(options)})


def with_hints(
    params: Mapping[str, Any] | None, tag: str, hints: Hints | None = None
) -> dict[str, Any]:
    """A request's `kv_transfer_params` with what the tiers are to know: whose it is, what the plan
    lets them give (everything, without `hints`), and to keep out of the way of a handoff."""
    told: dict[str, Any] = {**(params or {}), "tag": tag}
    if hints is not None:
        told |= _told(hints)
    if told.get("do_remote_prefill"):
        told["max_load_tokens"] = 0
    return told


def _told(hints: Hints) -> dict[str, Any]:
    """In vLLM's words, but for the deadline; `kv.offload` has vLLM count the tokens from the start
    of the prompt."""
    told: dict[str, Any] = {}
    if hints.reach_tokens is not None:
        told["max_load_tokens"] = hints.reach_tokens
        # Of the tiers behind the host tier; that one is asked in any case.
        told["kv_load_tiers"] = [_MATCHERS[tier] for tier in hints.tiers if tier in _MATCHERS]
    if hints.deadline_s is not None:
        told[DEADLINE] = hints.deadline_s
    return told


def _offloading(tiers: Tiers, identity: str) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "spec_name": "TieredSpec",
        "spec_module_path": "kv.offload",
        "cpu_bytes_to_use": tiers.host.bytes if tiers.host else STAGING_BYTES,
        # An answer is part of the conversation's next prompt.
        "offload_prompt_only": False,
    }
    if tiers.disk is not None:
        extra["secondary_tiers"] = [
            {
                "type": "DiskTier",
                "module_path": "kv.offload_disk",
                "path": tiers.disk.path,
                "budget_bytes": tiers.disk.bytes,
                "identity": identity,
            }
        ]
    return extra


def _hub_commit(model: str, revision: Any) -> str | None:
    """The commit of a hub's model that an engine is about to load, by its folder in the cache.

    Asked of the hub as vLLM asks it: the cache alone knows the commit of the last start.
    """
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(model, "config.json", revision=revision or None)
    except (OSError, ValueError):  # all of the hub's own, `HF_HUB_OFFLINE` without a copy too
        return None
    return Path(found).parent.name
