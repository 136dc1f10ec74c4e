"""KubeRay's resources against their own schemas, as an API server takes them.

A custom resource's schema is OpenAPI's: what is unknown is pruned in silence, which here is an
error, since it is a typing error of ours. Defaults are applied first, as the server does.
"""

import copy
import gzip
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[2]
_SHARED = Path("shared") / "data" / "kuberay"


def folder() -> Path | None:
    """Where KubeRay's definitions lie, in the checkout or beside it."""
    return next((at / _SHARED for at in (_ROOT, _ROOT.parent) if (at / _SHARED).is_dir()), None)


def read(definitions: Path) -> dict[tuple[str, str], Schema]:
    """Schemas by API version and kind."""
    found = {}
    for path in sorted(definitions.glob("*.yaml.gz")):
        spec = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def complaints(document: dict[str, Any], schemas: dict[tuple[str, str], Schema]) -> list[str]:
    """What is wrong with a resource, by its place; nothing is fine."""
    schema = schemas[document["apiVersion"], document["kind"]]
    whole = copy.deepcopy(document)
    _default(schema, whole)
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    errors = jsonschema.Draft202012Validator(strict).iter_errors(whole)
    return [f"{'/'.join(map(str, each.absolute_path))}: {each.message[:300]}" for each in errors]


def _strict(schema: Schema) -> Schema:
    """The same in JSON Schema, refusing what it does not know."""
    made = dict(schema)
    if "properties" in made:
        made["properties"] = {name: _strict(each) for name, each in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(made.get(name), dict):
            made[name] = _strict(made[name])
    if made.pop("x-kubernetes-int-or-string", False):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
        made.pop("format", None)
    if made.pop("nullable", False) and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _default(schema: Schema, value: Any) -> None:
    if isinstance(value, dict):
        for name, each in schema.get("properties", {}).items():
            if name not in value and "default" in each:
                value[name] = copy.deepcopy(each["default"])
            if name in value:
                _default(each, value[name])
    elif isinstance(value, list) and "items" in schema:
        for item in value:
            _default(schema["items"], item)
