"""Enough of a Kubernetes API server for Helm: discovery, and resources that are kept as sent.

No controller runs behind it and nothing is checked: schemas are what the other tests are for.
Helm keeps its releases as Secrets, which it sends in protobuf; everything else is JSON or YAML.
"""

import base64
import itertools
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Resource = dict[str, Any]
# Plural, and kind.
KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "secrets": "Secret",
        "configmaps": "ConfigMap",
        "services": "Service",
        "serviceaccounts": "ServiceAccount",
        "persistentvolumeclaims": "PersistentVolumeClaim",
    },
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy", "ingresses": "Ingress"},
    "monitoring.coreos.com/v1": {"podmonitors": "PodMonitor", "prometheusrules": "PrometheusRule"},
    "ray.io/v1": {"rayservices": "RayService"},
}
_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?(?:/(?P<plural>[^/]+))?(?:/(?P<name>[^/]+))?"
)
_PROTOBUF = b"k8s\0"
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


@dataclass
class Store:
    """What was sent; keys are version, plural, namespace and name."""

    resources: dict[tuple[str, str, str, str], Resource] = field(default_factory=dict)
    versions: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of_kind(self, kind: str) -> dict[str, Resource]:
        """Those of a kind, by name."""
        return {key[3]: each for key, each in self.resources.items() if each["kind"] == kind}


@contextmanager
def serving() -> Iterator[tuple[str, Store]]:
    """Its address, on loopback, and what it holds."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        """Nothing: tests say what went wrong."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        if path in _DISCOVERY:
            return self._answer(200, _DISCOVERY[path])
        found = self._found(path)
        if found is None:
            return self._refuse(404, "NotFound", path)
        if isinstance(found, dict):
            return self._answer(200, found)
        return self._read(*found)

    def _read(self, version: str, plural: str, namespace: str, name: str) -> None:
        if name:
            kept = self.store.resources.get((version, plural, namespace, name))
            if kept is None:
                return self._refuse(404, "NotFound", f'{plural} "{name}" not found')
            return self._answer(200, kept)
        asked = parse_qs(urlsplit(self.path).query).get("labelSelector", [""])[0]
        wanted = dict(each.split("=", 1) for each in asked.split(",") if "=" in each)
        items = [
            each
            for key, each in self.store.resources.items()
            if key[:2] == (version, plural)
            and namespace in ("", key[2])
            and wanted.items() <= each["metadata"].get("labels", {}).items()
        ]
        kind = f"{KINDS[version][plural]}List"
        meta = {"resourceVersion": str(next(self.store.versions))}
        self._answer(200, {"kind": kind, "apiVersion": version, "metadata": meta, "items": items})

    def do_POST(self) -> None:
        sent = self._sent()
        found = self._found(urlsplit(self.path).path)
        assert isinstance(found, tuple)
        key = (*found[:3], sent["metadata"]["name"])
        with self.store.lock:
            if key in self.store.resources:
                return self._refuse(409, "AlreadyExists", key[3])
            self._keep(key, sent, str(uuid.uuid4()))
        self._answer(201, sent)

    def do_PUT(self) -> None:
        sent, found = self._sent(), self._found(urlsplit(self.path).path)
        assert isinstance(found, tuple)
        kept = self.store.resources.get(found)
        if kept is None:
            return self._refuse(404, "NotFound", found[3])
        self._keep(found, sent, kept["metadata"]["uid"])
        self._answer(200, sent)

    def do_PATCH(self) -> None:
        sent, found = self._sent(), self._found(urlsplit(self.path).path)
        assert isinstance(found, tuple)
        kept = self.store.resources.get(found)
        if kept is None:
            return self._refuse(404, "NotFound", found[3])
        _merge(kept, sent)
        self._keep(found, kept, kept["metadata"]["uid"])
        self._answer(200, kept)

    def do_DELETE(self) -> None:
        found = self._found(urlsplit(self.path).path)
        self._body()
        assert isinstance(found, tuple)
        if self.store.resources.pop(found, None) is None:
            return self._refuse(404, "NotFound", found[3])
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _keep(self, key: tuple[str, str, str, str], sent: Resource, uid: str) -> None:
        meta = {"namespace": key[2], "uid": uid, "resourceVersion": str(next(self.store.versions))}
        sent["metadata"] |= {"creationTimestamp": "2026-01-01T00:00:00Z", **meta}
        self.store.resources[key] = sent

    def _found(self, path: str) -> tuple[str, str, str, str] | Resource | None:
        """What a path names: a key, whose name may be empty, or a list of kinds."""
        match = _PATH.fullmatch(path.rstrip("/"))
        if match is None:
            return None
        version = match["core"] or match["group"]
        if version not in KINDS:
            return None
        if match["plural"] is None:
            if match["namespace"]:
                return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "tests"}}
            return _resource_list(version)
        if match["plural"] not in KINDS[version]:
            return None
        return version, match["plural"], match["namespace"] or "", match["name"] or ""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _sent(self) -> Resource:
        body = self._body()
        if body.startswith(_PROTOBUF):
            return _of_protobuf(body.removeprefix(_PROTOBUF))
        sent: Resource = yaml.safe_load(body)
        return sent

    def _answer(self, code: int, resource: Resource) -> None:
        body = json.dumps(resource).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        told = {"reason": reason, "message": message, "code": code}
        self._answer(code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", **told})


def _resource_list(version: str) -> Resource:
    rows = [
        {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind}
        for plural, kind in KINDS[version].items()
    ]
    resources = [{**row, "verbs": _VERBS} for row in rows]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": resources,
    }


def _group(version: str) -> Resource:
    told = {"groupVersion": version, "version": version.split("/")[1]}
    return {"name": version.split("/")[0], "versions": [told], "preferredVersion": told}


_DISCOVERY: dict[str, Resource] = {
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [_group(version) for version in KINDS if "/" in version],
    },
}


def _merge(kept: Resource, sent: Resource) -> None:
    """As JSON merge patches go; strategic ones of what this chart has are the same."""
    for name, value in sent.items():
        if value is None:
            kept.pop(name, None)
        elif isinstance(value, dict) and isinstance(kept.get(name), dict):
            _merge(kept[name], value)
        else:
            kept[name] = value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: numbers with integers or bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
        else:
            assert tag & 7 == 2, tag
            size = number()
            yield tag >> 3, data[at : at + size]
            at += size


def _of_protobuf(data: bytes) -> Resource:
    """A Secret, which is what Helm keeps a release in, out of runtime.Unknown."""
    unknown = dict(_fields(data))
    kind = {number: value.decode() for number, value in _fields(unknown[1])}
    meta: Resource = {"labels": {}}
    held: Resource = {"apiVersion": kind[1], "kind": kind[2], "metadata": meta, "data": {}}
    for number, value in _fields(unknown[2]):
        if number == 1:
            _meta_of(value, meta)
        elif number == 2:
            pair = dict(_fields(value))
            held["data"][pair[1].decode()] = base64.b64encode(pair[2]).decode()
        elif number == 3:
            held["type"] = value.decode()
    return held


def _meta_of(data: bytes, meta: Resource) -> None:
    for number, value in _fields(data):
        if number == 1:
            meta["name"] = value.decode()
        elif number == 11:
            pair = dict(_fields(value))
            meta["labels"][pair[1].decode()] = pair[2].decode()
