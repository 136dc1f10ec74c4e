"""The configuration: merged key by key, and strict."""

from pathlib import Path
from typing import Any

import pytest

from cluster.app import _audit, _placed, environment
from cluster.cli import _change, _overrides, _parser
from cluster.config import DEFAULT, Config, check_nodes, engine_options, load
from cluster.errors import ConfigError
from cluster.home import ROOT
from cluster.status import describe, is_configured
from router.settings import AuditPlace
from workers.tiers import DiskTier, HostTier, PeerTier, Tiers


def test_the_default_file_loads_and_is_the_reference() -> None:
    """The embedded default is complete: it names every key that the types know."""
    import msgspec
    import yaml

    written = yaml.safe_load(DEFAULT.read_text())
    known: dict[str, Any] = msgspec.to_builtins(load(None, {}))
    for section, keys in known.items():
        assert section in written
        if isinstance(keys, dict) and section != "engine":
            assert set(written[section]) == set(keys)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    """Each file in configs/ is valid on its own."""
    assert load(path, {}).decode.replicas >= 1


def test_a_null_option_is_left_to_vllm() -> None:
    """The GPU file takes back CPU options by null."""
    config = load(ROOT / "configs" / "gpu-1x8.yaml", {})
    options = engine_options(config, config.prefill)
    assert "kv_cache_memory_bytes" not in options
    assert options["max_num_batched_tokens"] == 8192


def test_options_of_the_command_line_come_last(tmp_path: Path) -> None:
    """default < file < command line, merged key by key."""
    path = tmp_path / "a.yaml"
    path.write_text("prefill: {replicas: 3}\nengine: {max_num_seqs: 5}\n")
    words = ["serve", "--decode", "4", "--engine-arg", "max-model-len=99", "--port", "9"]
    config = load(path, _overrides(_parser().parse_args(words)))
    assert (config.prefill.replicas, config.decode.replicas, config.ingress.port) == (3, 4, 9)
    assert config.engine["max_num_seqs"] == 5
    assert config.engine["max_model_len"] == 99
    assert config.engine["dtype"] == "float32"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prefil: {replicas: 1}", "prefil"),
        ("prefill: {replica: 1}", "replica"),
        ("tiers: {vault: {bytes: 1}}", "vault"),
        ("tiers: {host: {gib: 1}}", "tiers.host"),
        ("tiers: {host: {bytes: 0}}", "tiers.host.bytes"),
        ("tiers: {disk: {bytes: 1}}", "path"),
        ("prefill: {replicas: -1}", "prefill.replicas"),
        ("prefill: {replicas: many}", "prefill.replicas"),
        ("ingress: {port: 0}", "ingress.port"),
        ("decode: {replicas: 0}", "decode.replicas"),
        ("served_names: []", "served_names"),
        ("device: tpu", "device"),
        ("[1, 2]", "list"),
        ("a: [", "YAML"),
        ("host: 0.0.0.0", "no address"),
        ("decode: {resources: {fast: 0}}", "decode.resources"),
        ('host: "::"', "no address"),
        ("catalogue: {replicas: 2}", "1 node"),
        ("router: {policy: fastest}", "router.policy"),
        ("router: {policy: null}", "router.policy"),
        ("router: {shadow: fastest}", "router.shadow"),
        ("router: {batch: {max_age_s: 0}}", "router.batch.max_age_s"),
        ("router: {batch: {max_requests: 0}}", "router.batch.max_requests"),
        ("router: {batch: {seats: 1.5}}", "router.batch.seats"),
        ("router: {batch: {max_age: 3}}", "max_age"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    """Unknown keys and wrong values name the file, the key and where keys are explained."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"configs/cpu\.yaml") as caught:
        load(path, {})
    assert says in str(caught.value)
    assert "wrong.yaml" in str(caught.value)


def test_tiers_are_off_unless_set_and_their_folder_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is one of the folder in which `serve` was called: replicas run elsewhere."""
    assert not load(None, {}).tiers
    path = tmp_path / "a.yaml"
    path.write_text("tiers: {host: {bytes: 5}, disk: {path: blocks, bytes: 7}}")
    monkeypatch.chdir(tmp_path)
    placed = _placed(load(path, {}).tiers)
    disk = DiskTier(path=str(tmp_path / "blocks"), bytes=7)
    assert placed == Tiers(host=HostTier(bytes=5), disk=disk)


def test_peers_need_a_host_tier_to_read(tmp_path: Path) -> None:
    """And what is set is what the replicas get."""
    with pytest.raises(ConfigError, match=r"tiers\.host"):
        load(None, {"tiers": {"peer": {}}})
    config = load(None, {"tiers": {"host": {"bytes": 5}, "peer": {"timeout_s": 1}}})
    assert config.tiers.peer == PeerTier(timeout_s=1.0)


def test_gpus_of_a_replica_are_its_ranks() -> None:
    """Tensor and pipeline parallel sizes multiply, and the pools may differ."""
    config = load(
        None,
        {"engine": {"tensor_parallel_size": 2}, "decode": {"engine": {"tensor_parallel_size": 4}}},
    )
    assert config.tensor_parallel(config.prefill) == 2
    assert config.tensor_parallel(config.decode) == 4
    assert isinstance(config, Config)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3"])
def test_several_nodes_want_an_address_each(host: str) -> None:
    """An address of one machine is refused with the remedy once Ray has a second node, and with
    `node` there is none for vLLM to hear before a process knows its own."""
    config = load(None, {"host": host})
    check_nodes(config, 1)
    with pytest.raises(ConfigError, match="2 nodes: set host: node"):
        check_nodes(config, 2)
    several = load(None, {"host": "node"})
    check_nodes(several, 2)
    assert environment(config, "hub/name", 1)["VLLM_HOST_IP"] == host
    assert "VLLM_HOST_IP" not in environment(several, "hub/name", 1)


def test_the_environment_names_a_ray_cluster_where_the_file_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `ray.init` takes it, which would otherwise join a cluster that it is told to start; and
    with a cluster joined there may be nodes for several catalogues."""
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert load(None, {"catalogue": {"replicas": 2}}).ray.address == "10.1.2.3:6379"
    assert load(None, {"ray": {"address": "auto"}}).ray.address == "auto"
    for own in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", own)
        assert load(None, {}).ray.address is None


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ([], {}),
        (["least_loaded"], {"policy": "least_loaded"}),
        (["--shadow", "none"], {"shadow": None}),
        (
            ["breakeven", "--shadow", "round_robin"],
            {"policy": "breakeven", "shadow": "round_robin"},
        ),
    ],
)
def test_the_policy_command_orders_what_it_is_given(
    words: list[str], change: dict[str, str | None]
) -> None:
    """What is not given is not changed, and `none` is no shadow."""
    assert _change(_parser().parse_args(["policy", *words])) == change


def test_the_policy_command_names_the_policies_to_a_wrong_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A policy that does not exist is refused before anything is sent."""
    with pytest.raises(SystemExit):
        _parser().parse_args(["policy", "fastest"])
    assert "least_loaded" in capsys.readouterr().err


def test_status_names_the_configured_policy_where_another_is_in_force() -> None:
    """And a shadow that differs is a difference too."""
    configured = {"policy": "breakeven", "shadow": None}
    assert describe({**configured, "configured": configured}) == "policy: breakeven, shadow: none"
    ordered = {"policy": "least_loaded", "shadow": None, "configured": configured}
    assert "(configured: breakeven, shadow: none)" in describe(ordered)
    assert not is_configured({**configured, "shadow": "round_robin", "configured": configured})


def test_an_audit_is_written_to_the_cache_unless_it_is_told_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By absolute paths: replicas run elsewhere. No files, no audit."""
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path))
    place = _audit(load(None, {}))
    assert place == AuditPlace(str(tmp_path / "audit"), 16_777_216, 4)
    there = _audit(load(None, {"audit": {"path": "~/audit", "files": 1}}))
    assert there is not None
    assert Path(there.folder) == Path.home() / "audit"
    assert _audit(load(None, {"audit": {"files": 0}})) is None


@pytest.mark.parametrize("audit", [{"files": -1}, {"files": 1001}, {"file_bytes": 100}, {"on": 1}])
def test_an_audit_without_bounds_is_refused(audit: dict[str, int]) -> None:
    """Too many files, too small ones, unknown keys."""
    with pytest.raises(ConfigError, match="audit"):
        load(None, {"audit": audit})
