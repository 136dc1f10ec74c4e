"""The chart as Helm renders it."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "breakeven"
ALERTS = CHART / "monitoring" / "alerts.yaml"
VALUES = {path.stem: path for path in sorted((CHART / "values").glob("*.yaml"))}
KEYS = ("secrets.keys=breakeven-keys",)

Document = dict[str, Any]


@dataclass(frozen=True)
class Helm:
    """One Helm; `env` is its environment."""

    program: str
    env: Mapping[str, str]

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Until it ends."""
        return subprocess.run(
            [self.program, *words],
            env={**os.environ, **self.env},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def template(
        self,
        values: str | None = None,
        sets: Sequence[str] = KEYS,
        more: Mapping[str, Any] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """The chart with a file of values by name, settings, and further values."""
        words = ["template", "test", str(CHART), "--namespace", "tests"]
        words += [] if values is None else ["-f", str(VALUES[values])]
        for each in sets:
            words += ["--set", each]
        return self.run(*words, "-f", "-", stdin=json.dumps(more or {}))

    def documents(
        self,
        values: str | None = None,
        sets: Sequence[str] = KEYS,
        more: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        """What that renders; the test fails where it is refused."""
        done = self.template(values, sets, more)
        assert done.returncode == 0, done.stderr
        return parsed(done.stdout)


def parsed(text: str) -> list[Document]:
    """The documents of a file of manifests."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def of_kind(documents: Sequence[Document], kind: str) -> list[Document]:
    return [each for each in documents if each["kind"] == kind]


def serve_config(documents: Sequence[Document]) -> dict[str, Any]:
    """What KubeRay hands to Serve."""
    [service] = of_kind(documents, "RayService")
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def pods(documents: Sequence[Document]) -> dict[str, dict[str, Any]]:
    """Pod templates of the RayService by group."""
    [service] = of_kind(documents, "RayService")
    ray = service["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in ray["workerGroupSpecs"]}
    return {"head": ray["headGroupSpec"]["template"], **workers}
