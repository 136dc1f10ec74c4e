"""What of the chart is made from something else: its schema of values, and k8s/ from itself.

`chart.py schema` writes helm/breakeven/values.schema.json; `chart.py manifests --helm PATH` renders
k8s/ with that Helm. `--check` writes nothing, and exits with 1 where a file would change.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "breakeven"
SCHEMA = CHART / "values.schema.json"
MANIFESTS = ROOT / "k8s"
# What k8s/ is rendered with, beside a file of values: Secrets that are made by hand.
_SECRETS = ("secrets.keys=breakeven-keys", "secrets.cluster=breakeven-cluster")
_RENDERED = ("cpu", "gpu-1x8")
# The chart sets these, by configuration type.
_OURS = {
    "Config": ("host", "ray", "metrics"),
    "Pool": ("resources", "surge"),
    "IngressSection": (
        "host", "port", "keys_file", "tls_cert_file", "tls_key_file", "resources",
    ),
    "CatalogueSection": ("resources",),
    "Vault": ("resources",),
}  # fmt: skip
_QUANTITY = {"type": ["string", "integer"], "pattern": "^[0-9.]+([EPTGMk]i?|m)?$"}
_NAMED = {"type": "array", "items": {"type": "object"}}
# Where a default alone does not say what may stand there.
_KNOWN: dict[str, Any] = {
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "cache.accessMode": {"enum": ["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]},
    "cache.size": _QUANTITY,
    "upgradeStrategy": {"enum": ["NewCluster", "None"]},
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 20},
    "rdma.count": {"type": "integer", "minimum": 1},
    "redis.address": {"type": "string", "pattern": "^$|^(rediss?://)?[^/]+:[0-9]+$"},
}
_OF_A_GROUP: dict[str, Any] = {
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"type": "object", "additionalProperties": _QUANTITY}
            for name in ("requests", "limits")
        },
    },
    "shm": _QUANTITY,
    "scratch": _QUANTITY,
    "maxUnavailable": {"type": "integer", "minimum": 0},
    "env": _NAMED,
    "tolerations": _NAMED,
}


def schema() -> dict[str, Any]:
    """JSON Schema of the chart's values; `config` is what our own loader takes, less what the
    chart sets itself."""
    from cluster.config import schema as of_config

    sections = of_config()
    for name, keys in _OURS.items():
        for key in keys:
            del sections["$defs"][name]["properties"][key]
    # Beside a $ref some of Helm's validators see nothing else.
    decode = sections["$defs"]["Config"]["properties"]["decode"]
    at_least_one = {"properties": {"replicas": {"minimum": 1}}}
    decode["allOf"] = [{"$ref": decode.pop("$ref")}, at_least_one]
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    found = _object(defaults, "")
    found["properties"]["config"] = {"$ref": sections["$ref"]}
    # Helm's own.
    found["properties"]["global"] = {"type": "object"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **found,
        "$defs": _used(sections["$defs"], found),
    }


def _used(definitions: Mapping[str, Any], found: Any) -> dict[str, Any]:
    """The definitions that `found` refers to, by one another too."""
    used: set[str] = set()
    while new := _referred([found, *map(definitions.get, used)]) - used:
        used |= new
    return {name: each for name, each in definitions.items() if name in used}


def _referred(found: Any) -> set[str]:
    return set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(found)))


def _object(defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    names = {name: _value(default, f"{path}{name}") for name, default in defaults.items()}
    return {"type": "object", "additionalProperties": False, "properties": names}


def _value(default: Any, path: str) -> dict[str, Any]:
    group = path.split(".")
    if group[0] == "groups" and len(group) == 3 and group[2] in _OF_A_GROUP:
        return dict(_OF_A_GROUP[group[2]])
    if path in _KNOWN:
        return dict(_KNOWN[path])
    if isinstance(default, Mapping):
        # Nothing but a free mapping has no default: labels, selectors.
        free = not default or path.endswith("Labels")
        return {"type": "object"} if free else _object(default, f"{path}.")
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array"}
    return {"type": kinds[type(default)]}


def manifests(helm: str) -> dict[Path, str]:
    """What k8s/ is to hold, by file."""
    return {MANIFESTS / f"{name}.yaml": _rendered(helm, name) for name in _RENDERED}


def _rendered(helm: str, name: str) -> str:
    words = [helm, "template", "breakeven", str(CHART), "--namespace", "breakeven"]
    words += ["-f", str(CHART / "values" / f"{name}.yaml")]
    for secret in _SECRETS:
        words += ["--set", secret]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    head = (
        f"# Rendered from helm/breakeven and its values/{name}.yaml by `make chart`.\n"
        "# First make the namespace and the Secrets breakeven-keys and breakeven-cluster, as\n"
        f"# docs/operations.md says; then: kubectl apply -n breakeven -f k8s/{name}.yaml\n"
    )
    return head + done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["schema", "manifests"])
    parser.add_argument("--helm", default="helm")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "schema":
        files = {SCHEMA: json.dumps(schema(), indent=2) + "\n"}
    else:
        files = manifests(arguments.helm)
    changed = [path for path, text in files.items() if not _is(path, text)]
    for path in changed:
        print(f"{path.relative_to(ROOT)} {'would change' if arguments.check else 'written'}")
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path])
    return int(arguments.check and bool(changed))


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
