"""Clusters whose processes are killed and stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fault.books import Books
from tests.fault.faults import LEASE_S, LONG, LONG_ANSWER, SHORT, SHORT_ANSWER, ask_long, ask_short
from tests.fault.stage import Stage
from tests.flow.cluster_process import Cluster, running
from tests.flow.plain_engine import greedy
from tests.tiny_model import TinySpec, cached_tiny_model

# 16 KiB of KV a token: a transfer takes long enough to be caught half way.
FAT = TinySpec(heads=16, kv_heads=16, head_dim=64)
# Over TCP a read needs its source to live and to run, so that a fault can meet it; over shared
# memory it is over in a moment (tests/flow has faults there).
CONFIG = f"""
kv: {{transports: tcp, lease_s: {LEASE_S}}}
engine: {{kv_cache_memory_bytes: 268435456}}
# However slow the machine's loopback, a long prompt goes to a prefill replica, and none goes where
# it costs more to see what that takes.
router: {{assumed_streams: 8, explore: 0}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs real engines, and minutes."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.real_model)
            item.add_marker(pytest.mark.deep)


@pytest.fixture(scope="package")
def model(cache_dir: Path, default_model: Path) -> Path:
    return cached_tiny_model(cache_dir, default_model, FAT)


@pytest.fixture(scope="package")
def truth(model: Path) -> dict[str, list[int]]:
    """What one plain engine answers to the long and the short prompt."""
    asked = [{"ids": LONG, "n": LONG_ANSWER}, {"ids": SHORT, "n": SHORT_ANSWER}]
    return dict(zip(("long", "short"), greedy(model, asked), strict=True))


@pytest.fixture(scope="package")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.clear()


@pytest.fixture(scope="module")
def shared_pools(
    stage: Stage,
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    truth: dict[str, list[int]],
    free_port: Callable[[], int],
) -> tuple[Cluster, Books]:
    """Two prefill and two decode replicas, all met."""

    @contextmanager
    def start() -> Iterator[Cluster]:
        tmp = tmp_path_factory.mktemp("pools")
        (tmp / "tcp.yaml").write_text(CONFIG)
        words = ("--prefill", "2", "--decode", "2", "--model", str(model))
        words += ("--config", str(tmp / "tcp.yaml"))
        with running(tmp, model.parent, free_port(), *words) as cluster:
            for role in ("prefill", "decode"):
                cluster.await_back(role, 2, (), pairs=2)
            assert ask_long(cluster, "first").done().tokens == truth["long"]
            assert ask_short(cluster, "first").done().tokens == truth["short"]
            cluster.await_rest()
            yield cluster

    return stage.show("pools", start)


@pytest.fixture
def pools(shared_pools: tuple[Cluster, Books]) -> Iterator[Cluster]:
    """The shared cluster, whose books must balance after the test."""
    cluster, books = shared_pools
    yield cluster
    books.check(cluster)
