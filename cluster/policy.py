"""`breakeven policy`: which routing policy is in force, and the kill switch."""

import json

from cluster.status import address, describe, fetch


def policy(change: dict[str, str | None], as_json: bool) -> int:
    """Order `change`, if there is any, and print what is in force.

    Raises `NotRunningError`, `AdminKeyError`, or `RefusedError` with the cluster's own words.
    """
    report = fetch(address(), "/admin/policy", change or None)
    if as_json:
        print(json.dumps(report))
        return 0
    print(describe(report))
    if change:
        print(f"every ingress goes by it within about {report['within_s']:g} s")
    return 0
