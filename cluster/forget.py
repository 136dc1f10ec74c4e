"""`breakeven forget`: erase a tenant's cached blocks on every replica."""

import json
from typing import Any

from cluster.status import address, fetch

# Longer than the ingress waits for its replicas.
_TIMEOUT_S = 60.0


def forget(tenant: str, as_json: bool) -> int:
    """Print what each replica did; 1 if one of them could not be reached. Raises
    `NotRunningError`."""
    report = fetch(address(), "/admin/forget", {"tenant": tenant}, _TIMEOUT_S)
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(_line(row) for row in report["replicas"]) or "no replica is known")
    return 0 if report["complete"] else 1


def _line(row: dict[str, Any]) -> str:
    if row["complaint"] is not None:
        return f"{row['name']}: not erased: {row['complaint']}"
    in_use = f", {row['in_use']} of them overwritten when their requests end" * bool(row["in_use"])
    return f"{row['name']}: {row['blocks']} blocks erased{in_use}"
