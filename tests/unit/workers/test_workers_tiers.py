from pathlib import Path

import msgspec
import pytest

from kv.catalogue import Tier
from kv.codecs.codec import CodecName
from kv.head import Head, head_of
from kv.plan import UNHINTED, Hints
from workers.connector import KEEP_FOR_DECODE, transfer_config
from workers.messages import Keep, Role
from workers.tiers import (
    STAGING_BYTES,
    TIERED_CONNECTOR,
    DiskTier,
    HostTier,
    PeerHint,
    PeerTier,
    Tiers,
    Vault,
    VaultDisk,
    keep_of,
    model_identity,
    peer_of,
    shard_names,
    with_hints,
    with_peer,
    with_tiers,
)

HOST, DISK = HostTier(bytes=1 << 20), DiskTier(path="/x", bytes=1 << 21)
VAULT = Vault(shards=2, memory_bytes=1 << 22, disk=VaultDisk(path="/v", bytes=1 << 23), ttl_s=60.0)


@pytest.mark.parametrize("role", list(Role))
def test_handoffs_keep_their_settings_beside_tiers(role: Role) -> None:
    """NIXL comes first and as it was; what else reads the transfer's settings finds them."""
    alone = transfer_config(role, "cpu", 30)
    both = with_tiers(alone, Tiers(host=HOST), "model")
    nixl, offload = both["kv_connector_extra_config"]["connectors"]
    assert nixl == alone
    assert offload["kv_connector"] == TIERED_CONNECTOR
    assert offload["kv_connector_module_path"] == "kv.offload"
    assert both["kv_connector"] == "MultiConnector"
    assert both["kv_role"] == alone["kv_role"]
    assert both["kv_load_failure_policy"] == offload["kv_load_failure_policy"] == "recompute"
    assert both["kv_connector_extra_config"]["kv_lease_duration"] == 30


def test_an_engine_id_is_given_once() -> None:
    """vLLM hands the outer one to each connector and refuses a second."""
    both = with_tiers({**transfer_config(Role.DECODE, "cpu", 30), "engine_id": "e"}, Tiers(), "m")
    assert both["engine_id"] == "e"
    assert all("engine_id" not in c for c in both["kv_connector_extra_config"]["connectors"])


def test_each_tier_is_optional() -> None:
    """Without a host tier, disk blocks pass through a staging area; without both, nothing."""

    def offloading(tiers: Tiers) -> dict[str, object]:
        transfer = with_tiers(transfer_config(Role.DECODE, "cpu", 30), tiers, "model")
        extra: dict[str, object] = transfer["kv_connector_extra_config"]["connectors"][1]
        return extra["kv_connector_extra_config"]  # type: ignore[return-value]

    assert not Tiers()
    assert "secondary_tiers" not in offloading(Tiers(host=HOST))
    only_disk = offloading(Tiers(disk=DISK))
    assert only_disk["cpu_bytes_to_use"] == STAGING_BYTES
    [disk] = only_disk["secondary_tiers"]  # type: ignore[misc]
    assert (disk["path"], disk["budget_bytes"], disk["key_file"]) == ("/x", 1 << 21, None)
    assert only_disk["load_timeout_s"] == 5.0
    assert offloading(Tiers(host=HOST, disk=DISK))["cpu_bytes_to_use"] == 1 << 20
    assert Tiers(vault=VAULT)
    [vault] = offloading(Tiers(vault=VAULT))["secondary_tiers"]  # type: ignore[misc]
    assert (vault["shards"], vault["ttl_s"], vault["identity"]) == (2, 60.0, "model")
    both = offloading(Tiers(disk=DISK, vault=VAULT))["secondary_tiers"]
    assert [tier["type"] for tier in both] == ["DiskTier", "VaultTier"]  # type: ignore[attr-defined]


def test_a_request_with_a_handoff_leaves_the_tiers_alone() -> None:
    """The connector takes from one source a request; its own parameters stay as they are."""
    handoff = {"do_remote_prefill": True, "remote_engine_id": "p"}
    assert with_hints(handoff, "aa") == {**handoff, "tag": "aa", "max_load_tokens": 0}
    assert with_hints({"do_remote_decode": True}, "")["do_remote_decode"]
    assert with_hints(None, "aa") == {"tag": "aa"}
    assert "tag" not in handoff


def test_a_plan_s_hints_are_in_vllms_words() -> None:
    """How much may be loaded, from which tiers behind the host tier, and until when."""
    assert with_hints(None, "aa", Hints()) == {
        "tag": "aa",
        "max_load_tokens": 0,
        "kv_load_tiers": [],
    }
    fetch = Hints(96, (Tier.HOST, Tier.DISK), 0.5)
    assert with_hints(KEEP_FOR_DECODE, "", fetch) == {
        **KEEP_FOR_DECODE,
        "tag": "",
        "max_load_tokens": 96,
        "kv_load_tiers": [{"medium": "STORAGE", "locality": "LOCAL"}],
        "load_deadline_s": 0.5,
    }
    assert with_hints(None, "", UNHINTED) == {"tag": ""}
    assert with_hints({"do_remote_prefill": True}, "", fetch)["max_load_tokens"] == 0
    lent = with_hints(None, "", Hints(96, (Tier.PEER,), 0.5, "tcp://10.0.0.1:5"))
    assert peer_of(lent) == PeerHint("tcp://10.0.0.1:5", 0.5)
    assert lent["kv_load_tiers"] == [{"medium": "CPU", "locality": "REMOTE"}]


def test_a_split_waits_for_its_head_as_long_as_the_plan_says() -> None:
    """The peer is asked for the head alone, the tail's tier for the rest, each by its own time."""
    hints = Hints(96, (Tier.VAULT,), 5.0, "tcp://10.0.0.1:5", 64, 3.0)
    told = with_hints(None, "", hints)
    assert head_of(told) == Head(64)
    assert peer_of(told) == PeerHint("tcp://10.0.0.1:5", 3.0)
    assert (told["max_load_tokens"], told["load_deadline_s"]) == (96, 5.0)
    assert told["kv_load_tiers"] == [{"medium": "STORAGE", "locality": "REMOTE"}]


def test_a_peer_comes_last_and_waits_as_long_as_it_is_set() -> None:
    """What is on the replica's own disk is not asked for elsewhere."""
    tiers = Tiers(host=HOST, disk=DISK, peer=PeerTier(timeout_s=1.5))
    transfer = with_tiers(transfer_config(Role.DECODE, "cpu", 30), tiers, "model")
    offload = transfer["kv_connector_extra_config"]["connectors"][1]["kv_connector_extra_config"]
    disk, peer = offload["secondary_tiers"]
    assert (disk["type"], peer["type"]) == ("DiskTier", "PeerTier")
    assert (peer["timeout_s"], peer["identity"]) == (1.5, "model")


@pytest.mark.parametrize("timeout_s", [None, 0.25])
def test_a_hint_names_a_peer_beside_what_is_there(timeout_s: float | None) -> None:
    """It comes back as it was given, through another hint, and leaves its argument alone."""
    handoff = {"do_remote_decode": True}
    peer = PeerHint("tcp://10.0.0.1:5", timeout_s)
    hinted = with_hints(with_peer(handoff, peer), "aa")
    assert peer_of(hinted) == peer
    assert hinted["do_remote_decode"]
    assert hinted["tag"] == "aa"
    assert handoff == {"do_remote_decode": True}


@pytest.mark.parametrize(
    "params", [None, {}, {"remote_kv_source": 5}, {"remote_kv_source": {"address": "here"}}]
)
def test_what_names_no_peer_is_no_hint(params: dict[str, object] | None) -> None:
    assert peer_of(params) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": {"bytes": 0}},
        {"peer": {"timeout_s": 0}},
        {"peer": {"timeout_s": 31}},
        {"host": {}},
        {"disk": {"bytes": 5}},
        {"disk": {"path": "", "bytes": 5}},
        {"vault": {}},
        {"vault": {"memory_bytes": 5, "shards": 0}},
        {"vault": {"memory_bytes": 5, "ttl_s": 0}},
        {"vault": {"memory_bytes": 5, "disk": {"path": "/x"}}},
        {"host": {"bytes": 5, "gib": 1}},
        {"disk": {"path": "/x", "bytes": 5, "key_file": ""}},
        {"load_timeout_s": 0},
    ],
)
def test_what_is_not_a_tier_is_refused(wrong: dict[str, object]) -> None:
    """Unknown keys, missing ones, and sizes that hold nothing."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Tiers)


def test_a_vault_s_lossy_codec_is_one_that_loses() -> None:
    """None unless it is set; `raw` is what all others are stored by."""
    assert msgspec.convert({"memory_bytes": 5}, Vault).lossy is None
    assert msgspec.convert({"memory_bytes": 5, "lossy": "int8"}, Vault).lossy is CodecName.INT8
    for wrong in ("raw", "int9"):
        with pytest.raises(msgspec.ValidationError, match=r"lossy|int9"):
            msgspec.convert({"memory_bytes": 5, "lossy": wrong}, Vault)


def test_how_blocks_are_kept_reaches_the_tiers() -> None:
    """It comes back as it was given; what says nothing is kept as all are."""
    keep = Keep(CodecName.INT8, 86_400.0)
    assert keep_of(with_hints(None, "aa", keep=keep)) == keep
    assert keep_of(with_hints(None, "aa")) == keep_of(None) == Keep()


def test_shards_are_named_by_number() -> None:
    """Blocks are placed by these names: more shards must not rename those that there were."""
    assert shard_names(3) == ("vault-0", "vault-1", "vault-2")
    assert shard_names(2) == shard_names(3)[:2]


def test_a_hubs_model_is_known_by_the_commit_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub has now counts, not what it had at the last start; without an answer, no block
    is found again."""
    commit: str | None = "a"

    def download(*_: object, revision: str | None) -> str:
        if commit is None:
            raise FileNotFoundError("offline, and not in the cache")
        return str(tmp_path / "snapshots" / (revision or commit) / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first = model_identity("org/model", {})
    assert model_identity("org/model", {}) == first
    commit = "b"
    assert model_identity("org/model", {}) != first
    pinned = model_identity("org/model", {"revision": "c"})
    commit = "d"
    assert model_identity("org/model", {"revision": "c"}) == pinned
    commit = None
    assert model_identity("org/model", {}) != model_identity("org/model", {})


def test_a_model_is_known_by_its_options_too(tmp_path: object) -> None:
    """An option that may change a page's bytes is another identity."""
    plain = model_identity(str(tmp_path), {"dtype": "float32", "max_num_seqs": 4})
    assert plain == model_identity(str(tmp_path), {"dtype": "float32", "max_num_seqs": 8})
    assert plain != model_identity(str(tmp_path), {"dtype": "bfloat16"})
