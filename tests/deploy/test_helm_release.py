"""A release's life by real Helms, against enough of an API server."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import api_server
from tests.deploy.chart import CHART, Helm

NAME, NAMESPACE = "breakeven", "tests"


class Release:
    """A release, and what the server holds of it."""

    def __init__(self, helm: Helm, kubeconfig: Path, store: api_server.Store) -> None:
        self.store = store
        self._helm = Helm(helm.program, {**helm.env, "KUBECONFIG": str(kubeconfig)})
        # Helm 4 would have the server merge what it applies.
        self._client_side = ["--server-side=false"] if "helm4" in helm.program else []

    def run(self, verb: str, values: dict[str, Any] | None = None) -> tuple[int, str]:
        """Exit status and what was said."""
        words = [verb, NAME]
        if values is not None:
            words += [str(CHART), "--disable-openapi-validation", "-f", "-", *self._client_side]
        elif verb == "rollback":
            words += ["1", *self._client_side]
        done = self._helm.run(*words, "--namespace", NAMESPACE, stdin=json.dumps(values or {}))
        return done.returncode, done.stdout + done.stderr

    def secret(self, name: str) -> None:
        """Make one by hand."""
        made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {}}
        self.store.resources["v1", "secrets", NAMESPACE, name] = made

    def key(self) -> str:
        """The cluster's."""
        kept = self.store.of_kind("Secret")[f"{NAME}-cluster"]["data"]["key"]
        return base64.b64decode(kept).decode()

    def decodes(self) -> int:
        """Replicas that the RayService asks for."""
        service = self.store.of_kind("RayService")[NAME]
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        replicas: int = config["applications"][0]["args"]["decode"]["replicas"]
        return replicas


@pytest.fixture
def release(helm: Helm, tmp_path: Path) -> Iterator[Release]:
    with api_server.serving() as (url, store):
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "users": [{"name": "me", "user": {}}],
        }
        file = tmp_path / "kubeconfig"
        file.write_text(yaml.safe_dump(config))
        file.chmod(0o600)
        made = Release(helm, file, store)
        made.secret("breakeven-keys")
        yield made


def _values(decodes: int, **more: Any) -> dict[str, Any]:
    config = {"decode": {"replicas": decodes}, **more}
    return {"secrets": {"keys": "breakeven-keys"}, "config": config}


def test_a_release_is_installed_upgraded_rolled_back_and_removed(release: Release) -> None:
    """Each step is what the values say, the cluster's key stays the same, and nothing is left."""
    status, said = release.run("install", _values(2))
    assert status == 0, said
    assert "kubectl -n tests get rayservice breakeven" in said
    key, kinds = release.key(), {each["kind"] for each in release.store.resources.values()}
    assert len(bytes.fromhex(key)) == 32
    assert {"RayService", "Service", "NetworkPolicy", "PodDisruptionBudget", "Secret"} <= kinds
    status, said = release.run("upgrade", _values(3))
    assert status == 0, said
    assert (release.decodes(), release.key()) == (3, key)
    status, said = release.run("rollback")
    assert status == 0, said
    assert (release.decodes(), release.key()) == (2, key)
    status, said = release.run("uninstall")
    assert status == 0, said
    assert [key[3] for key in release.store.resources] == ["breakeven-keys"]


def test_an_upgrade_to_what_the_code_does_not_take_changes_nothing(release: Release) -> None:
    """A configuration with a key that is gone, or of another type, is refused before anything is
    sent; the release goes on as it is."""
    status, said = release.run("install", _values(2))
    assert status == 0, said
    for wrong in ({"roter": {}}, {"tiers": {"host": "2GiB"}}):
        before = json.dumps(sorted(release.store.resources.items()))
        status, said = release.run("upgrade", _values(4, **wrong))
        assert status != 0
        assert next(iter(wrong)) in said
        assert json.dumps(sorted(release.store.resources.items())) == before
    assert release.decodes() == 2


def test_a_secret_that_is_not_there_is_refused_with_the_command_that_makes_it(
    release: Release,
) -> None:
    """Its pods would wait for it in silence; made, one after another, the release is installed."""
    before = dict(release.store.resources)
    secrets = {"cluster": "c", "ray": "r", "huggingFace": "h", "tls": "t"}
    values = _values(1)
    values["secrets"] |= secrets
    values["redis"] = {"address": "redis:6379", "secret": "s"}
    for name, kind in [*((name, "generic") for name in "crh"), ("t", "tls"), ("s", "generic")]:
        status, said = release.run("install", values)
        assert status != 0
        assert f"kubectl -n {NAMESPACE} create secret {kind} {name} --" in said
        assert release.store.resources.keys() == before.keys()
        release.secret(name)
        before = dict(release.store.resources)
    status, said = release.run("install", values)
    assert status == 0, said
