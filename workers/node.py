"""At which address a process of the cluster listens."""

import os

# As `host` in the configuration: each process listens at the address of its own Ray node.
OF_NODE = "node"


def listen_at(host: str) -> str:
    """The address for everything that this process opens; Serve's own port and what vLLM opens are
    bound to it from now on.

    To be called first in the constructor of a Serve replica. `host` is one address of this machine,
    or `OF_NODE`.
    """
    # Not at the top: the configuration names `OF_NODE`, and loads without Ray.
    from workers import serve_port

    address = _of_node() if host == OF_NODE else host
    serve_port.bind_to(address)
    # vLLM looks when it opens a port, and would ask the network for an address otherwise.
    os.environ["VLLM_HOST_IP"] = address
    return address


def _of_node() -> str:
    """By which other nodes of the Ray cluster know this one."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
