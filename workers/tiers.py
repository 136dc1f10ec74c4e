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
from kv.codecs.codec import CodecName
from kv.fingerprint import engine_facts, fingerprint, folder_identity, snapshot_identity
from kv.head import HEAD_TOKENS
from kv.keep import KEEP
from kv.plan import Hints
from kv.promoted import DEADLINE
from workers.messages import Keep

# Whose statistics are the tiers' (`kv.offload`).
TIERED_CONNECTOR = "TieredConnector"

# Shared memory through which blocks of other tiers pass where no host tier is set.
STAGING_BYTES = 268_435_456

# What the vault tier reports beside vLLM's metrics: bytes that the vault took.
VAULT_STORED_BYTES = "breakeven:vault_stored_bytes"

# Requests that neither read the tiers nor leave anything there (`workers.probe`).
NO_TIERS: dict[str, Any] = {"max_load_tokens": 0, "max_offload_tokens": 0}


# How vLLM tells the tiers behind the host tier apart.
_MATCHERS = {
    Tier.DISK: {"medium": "STORAGE", "locality": "LOCAL"},
    Tier.PEER: {"medium": "CPU", "locality": "REMOTE"},
    Tier.VAULT: {"medium": "STORAGE", "locality": "REMOTE"},
}

# What a process asks of Ray's custom resources beside cores, by name.
Resources = dict[str, Annotated[float, Meta(gt=0)]]

# In a request's kv_transfer_params: which replica has its blocks (`with_peer`).
PEER = "remote_kv_source"


class HostTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shared memory of one replica."""

    bytes: Annotated[int, Meta(ge=1)]


class DiskTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of one replica below `path`."""

    path: Annotated[str, Meta(min_length=1)]
    bytes: Annotated[int, Meta(ge=1)]
    # Of 32 bytes, this user's alone: blocks are encrypted with it.
    key_file: Annotated[str, Meta(min_length=1)] | None = None


class VaultDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of each shard, in a folder of its name below `path`."""

    path: Annotated[str, Meta(min_length=1)]
    bytes: Annotated[int, Meta(ge=1)]


class Vault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Processes of their own that keep blocks of all replicas. Sizes are those of each shard."""

    shards: Annotated[int, Meta(ge=1)] = 1
    cpus: Annotated[float, Meta(gt=0)] = 0.5
    resources: Resources = {}
    memory_bytes: Annotated[int, Meta(ge=1)]
    disk: VaultDisk | None = None
    ttl_s: Annotated[float, Meta(gt=0)] | None = None
    tenant_bytes: Annotated[int, Meta(ge=1)] | None = None
    # By which blocks of requests that allow it are stored.
    lossy: CodecName | None = None

    def __post_init__(self) -> None:
        if self.lossy is CodecName.RAW:
            raise ValueError("lossy: raw loses nothing; leave it out")


def shard_names(shards: int) -> tuple[str, ...]:
    """What a vault's shards are called; blocks are placed by these names."""
    return tuple(f"vault-{number}" for number in range(shards))


class PeerTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Other replicas' host tiers; a request waits for one at most `timeout_s` in all."""

    timeout_s: Annotated[float, Meta(gt=0, le=30)] = 2.0


class PeerHint(msgspec.Struct, frozen=True):
    """Which replica has a request's blocks: its `Replica.peer_address`. A plan that waits for less
    than the tier does says so by `timeout_s`."""

    address: str
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where evicted blocks stay; nothing is kept where none is set."""

    host: HostTier | None = None
    disk: DiskTier | None = None
    peer: PeerTier | None = None
    vault: Vault | None = None
    # The longest that a request waits for blocks; then it computes what has not come.
    load_timeout_s: Annotated[float, Meta(gt=0)] = 5.0

    def __bool__(self) -> bool:
        return any(tier is not None for tier in (self.host, self.disk, self.vault))


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
    params: Mapping[str, Any] | None,
    tag: str,
    hints: Hints | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """A request's `kv_transfer_params` with what the tiers are to know: whose it is, what the plan
    lets them give (everything, without `hints`), how they may `keep` its blocks, and to keep out of
    the way of a handoff."""
    told: dict[str, Any] = {**(params or {}), "tag": tag}
    if keep is not None:
        told[KEEP] = msgspec.to_builtins(keep)
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
    if hints.peer is None:
        return told
    if not hints.head_tokens:
        return with_peer(told, PeerHint(hints.peer, hints.deadline_s))
    told[HEAD_TOKENS] = hints.head_tokens
    return with_peer(told, PeerHint(hints.peer, hints.head_deadline_s))


def keep_of(params: Mapping[str, Any] | None) -> Keep:
    """How a request lets its blocks be stored, by its `kv_transfer_params`."""
    return msgspec.convert((params or {}).get(KEEP, {}), Keep)


def with_peer(params: Mapping[str, Any] | None, peer: PeerHint) -> dict[str, Any]:
    """A request's `kv_transfer_params` with the replica that is to be asked for its blocks."""
    hint = {"address": peer.address}
    timeout = {} if peer.timeout_s is None else {"timeout_s": peer.timeout_s}
    return {**(params or {}), PEER: {**hint, **timeout}}


def peer_of(params: Mapping[str, Any] | None) -> PeerHint | None:
    """The hint in a request's `kv_transfer_params`; None without one that makes sense."""
    try:
        hint = msgspec.convert((params or {}).get(PEER), PeerHint | None)
    except msgspec.ValidationError:
        return None
    return hint if hint is not None and hint.address.startswith("tcp://") else None


def _offloading(tiers: Tiers, identity: str) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "spec_name": "TieredSpec",
        "spec_module_path": "kv.offload",
        "cpu_bytes_to_use": tiers.host.bytes if tiers.host else STAGING_BYTES,
        # An answer is part of the conversation's next prompt.
        "offload_prompt_only": False,
        "load_timeout_s": tiers.load_timeout_s,
    }
    if behind := _behind_host(tiers, identity):
        extra["secondary_tiers"] = behind
    return extra


def _behind_host(tiers: Tiers, identity: str) -> list[dict[str, Any]]:
    """In the order in which they are asked for a block."""
    return [
        *([] if tiers.disk is None else [_disk(tiers.disk, identity)]),
        *([] if tiers.peer is None else [_peer(tiers.peer, identity)]),
        *([] if tiers.vault is None else [_vault(tiers.vault, identity)]),
    ]


def _peer(peer: PeerTier, identity: str) -> dict[str, Any]:
    return {
        "type": "PeerTier",
        "module_path": "workers.peer.tier",
        "timeout_s": peer.timeout_s,
        "identity": identity,
    }


def _disk(disk: DiskTier, identity: str) -> dict[str, Any]:
    return {
        "type": "DiskTier",
        "module_path": "kv.offload_disk",
        "path": disk.path,
        "budget_bytes": disk.bytes,
        "identity": identity,
        "key_file": disk.key_file,
    }


def _vault(vault: Vault, identity: str) -> dict[str, Any]:
    # Not its keys: vLLM logs its configuration.
    return {
        "type": "VaultTier",
        "module_path": "workers.vault.tier",
        "shards": vault.shards,
        "ttl_s": vault.ttl_s,
        "identity": identity,
    }


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
