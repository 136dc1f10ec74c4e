"""`breakeven policy`: which routing policy is in force, and the kill switch."""

import json
import urllib.error
import urllib.request
from typing import Any

from cluster.config import admin_key
from cluster.errors import AdminKeyError, NotRunningError, RefusedError
from cluster.status import address, describe, fetch

# An ingress gives up on its store before.
_TIMEOUT_S = 10


def policy(change: dict[str, str | None], as_json: bool) -> int:
    """Order `change`, if there is any, and print what is in force.

    Raises `NotRunningError`, `AdminKeyError`, or `RefusedError` with the cluster's own words.
    """
    url = address()
    report = _post(url, "/admin/policy", change) if change else fetch(url, "/admin/policy")
    print(json.dumps(report) if as_json else describe(report))
    if change and not as_json:
        print(f"every ingress goes by it within about {report['within_s']:g} s")
    return 0


def _post(url: str, path: str, body: dict[str, str | None]) -> Any:
    headers = {"content-type": "application/json"}
    key = admin_key()
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise AdminKeyError(url) from error
        raise RefusedError(url, _complaint(error)) from error
    except (OSError, ValueError) as error:
        raise NotRunningError(url) from error


def _complaint(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
