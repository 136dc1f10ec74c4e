"""The address at which a process listens."""

import os

import pytest
import ray

from workers import node, serve_port


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), (node.OF_NODE, "10.9.8.7")]
)
def test_everything_listens_at_one_address(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    """The configured one, or that of the Ray node; Serve's port and vLLM's hear of it too."""
    bound: list[str] = []
    monkeypatch.setattr(serve_port, "bind_to", bound.append)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.9.8.7")
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.1")
    assert node.listen_at(host) == address
    assert bound == [address]
    assert os.environ["VLLM_HOST_IP"] == address
