"""Keeps a Serve replica's own port off the network.

Ray Serve 2.60 opens one port a replica for calls between deployments, bound to every interface,
and what arrives there is unpickled (`replica.py`, `_on_initialized`). No call of ours takes that
way, so the port is bound to the replica's host instead; there is no setting for it.
"""

from typing import Any

from ray.serve._private import replica as serve_replica

_ANY = "[::]:"


def bind_to(host: str) -> None:
    """From now on Serve's replica server of this process listens on `host` only.

    Call it in a replica's constructor: Serve opens the port right after.
    """
    original = serve_replica.add_port_to_grpc_server
    address = f"[{host}]" if ":" in host else host

    def bound(server: Any, wanted: str) -> int:
        port: int = original(server, wanted.replace(_ANY, f"{address}:"))
        return port

    serve_replica.add_port_to_grpc_server = bound
