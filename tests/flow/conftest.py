"""Real clusters, started once for the tests of a module."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.flow.cluster_process import Cluster, running

# One of each path that a request can take, and of what we lean on: these are part of `make test`.
QUICK = frozenset(
    {
        *("test_http", "test_tokens", "test_disconnect", "test_failover", "test_batch"),
        *("test_links", "test_split", "test_tiers", "test_vault_tier", "test_vault_cluster"),
        *("test_vllm_contract", "test_tiers_contract", "test_link_contract"),
        *("test_geometry_contract", "test_codec_layout"),
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs real engines, and most of it minutes."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if item.path.stem not in QUICK:
                item.add_marker(pytest.mark.deep)


@pytest.fixture(scope="session")
def shared_cluster(
    tmp_path_factory: pytest.TempPathFactory, default_model: Path, free_port: Callable[[], int]
) -> Iterator[Cluster]:
    """One prefill and one decode replica of the real model, as `make serve` runs them."""
    tmp = tmp_path_factory.mktemp("cluster")
    config = tmp / "config.yaml"
    # However the start-up probes fall out, a long prompt goes to the prefill replica.
    config.write_text("served_names: [smollm2, another-name]\nrouter: {assumed_streams: 1}\n")
    words = ("--config", str(config))
    with running(tmp, default_model.parent, free_port(), *words) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, whose books must balance after the test."""
    yield shared_cluster
    shared_cluster.await_rest()


@pytest.fixture
def client(cluster: Cluster) -> OpenAI:
    """The real SDK; it must not retry what a test wants to see."""
    return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)
