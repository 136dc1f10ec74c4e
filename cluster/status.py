"""`breakeven status`: what runs, how busy it is, and how KV crosses."""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import state, tls
from cluster.config import admin_key
from cluster.errors import AdminKeyError, NotRunningError, RefusedError, TlsError

_TIMEOUT_S = 5
_DEFAULT_URL = "http://127.0.0.1:8000"


def status(as_json: bool) -> int:
    """Print the cluster's replicas, catalogue and links; raises `NotRunningError`."""
    url = address()
    report = {
        "url": url,
        "ready": _ready(url),
        **fetch(url, "/admin/replicas"),
        "curves": fetch(url, "/admin/curves"),
        "policy": fetch(url, "/admin/policy"),
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def address() -> str:
    """Where the cluster of this machine listens."""
    found = state.read()
    return found.url if found is not None else _DEFAULT_URL


def fetch(
    url: str,
    path: str,
    order: Mapping[str, object] | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> Any:
    """JSON from the ingress, which gets `order` as JSON if there is one.

    Raises `NotRunningError`, `AdminKeyError`, or `RefusedError` for an order that is not taken.
    """
    body = None if order is None else json.dumps(order).encode()
    headers = {} if order is None else {"content-type": "application/json"}
    key = admin_key()
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url + path, body, headers)
    try:
        with _open(request, timeout_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise AdminKeyError(url) from error
        if order is not None:
            raise RefusedError(url, _complaint(error)) from error
        raise NotRunningError(url) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(failed := getattr(error, "reason", None), ssl.SSLError):
            raise TlsError(url, tls.reason(failed)) from error
        raise NotRunningError(url) from error


def _complaint(error: urllib.error.HTTPError) -> str:
    """The cluster's own words."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def describe(report: dict[str, Any]) -> str:
    """The policy in force in a line, and the configured one where that is another."""
    line = f"policy: {_named(report)}"
    return line if is_configured(report) else f"{line} (configured: {_named(report['configured'])})"


def is_configured(report: dict[str, Any]) -> bool:
    """Whether what is in force is what the configuration says."""
    configured = report["configured"]
    return all(report[name] == configured[name] for name in ("policy", "shadow"))


def _named(order: dict[str, Any]) -> str:
    return f"{order['policy']}, shadow: {order['shadow'] or 'none'}"


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    """The answer; of a cluster with TLS, only from whoever has its certificate."""
    found = state.read()
    context = tls.trust(found.certificate if found is not None else None)
    return urllib.request.urlopen(request, timeout=timeout_s, context=context)


def _ready(url: str) -> bool:
    try:
        with _open(urllib.request.Request(f"{url}/readyz"), _TIMEOUT_S):
            return True
    except OSError:
        return False


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{report['url']}: {'ready' if report['ready'] else 'not ready'}")
    if not is_configured(report["policy"]):
        console.print(describe(report["policy"]))
    console.print(_replicas(report["replicas"]))
    catalogue = report["catalogue"]
    console.print(f"catalogue: {catalogue['state']}, {catalogue['blocks']} blocks")
    for shard in report["vault"]:
        size = f"{shard['blocks']} blocks, {shard['stored_bytes'] / 1e6:.0f} MB"
        console.print(f"{_name(shard)}: pid {shard['pid']}, {size}")
    if report["curves"]["links"]:
        console.print(_links(report))


def _replicas(rows: list[dict[str, Any]]) -> Table:
    table = Table("replica", "state", "pid", "streams", "prompt queue", "KV", "cached", "leases")
    for row in rows:
        table.add_row(
            _name(row),
            row["state"],
            str(row["pid"]),
            f"{row['running']}/{row['max_num_seqs']}",
            f"{row['waiting']} req {row['pending_prefill_tokens']} tok",
            f"{row['kv_usage']:.0%}",
            f"{row['cached_blocks']}/{row['kv_blocks']}",
            str(row["leased"]),
        )
    return table


def _name(row: dict[str, Any]) -> str:
    """Its node too, unless that is this machine."""
    local = row["node"] in ("127.0.0.1", "::1", "localhost")
    return str(row["name"]) if local else f"{row['name']} {row['node']}"


def _links(report: dict[str, Any]) -> Table:
    by_name = {row["name"]: row for row in report["replicas"]}
    table = Table("link", "transport", "latency", "bandwidth", "crossover", "received", "failed")
    for name, link in sorted(report["curves"]["links"].items()):
        receiver = by_name.get(name.split("->")[1], {})
        speed = link["bytes_per_s"]
        table.add_row(
            name,
            ", ".join(receiver.get("lanes", [])) or "none yet",
            f"{link['latency_s'] * 1e3:.0f} ms",
            f"{speed / 1e9:.2f} GB/s" if speed else "not measurable",
            crossover(link["crossover_tokens"]),
            f"{receiver.get('transfer_bytes', 0) / 1e6:.0f} MB",
            str(receiver.get("failed_transfers", 0)),
        )
    return table


def crossover(tokens: float | None) -> str:
    """From how many tokens on a prefix is worth moving."""
    return "never" if tokens is None else f"{tokens:.0f} tok"
