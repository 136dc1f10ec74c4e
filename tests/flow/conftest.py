"""Real clusters, started once for the tests of a module."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.flow.cluster_process import Cluster, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs real engines."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


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
