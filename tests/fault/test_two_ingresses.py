"""An ingress that dies or hangs, beside another one on the same port."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fault.books import Books, ingresses
from tests.fault.faults import KINDS, Kind, struck
from tests.fault.stage import Stage
from tests.flow.cluster_process import Cluster, running
from tests.flow.stream import Stream
from tests.waiting import await_that

GENERATED = 2500
# A replica takes an ingress for lost after 10 s of its silence.
ABORTED_S = 14.0


@pytest.fixture(scope="module")
def shared_pair(
    stage: Stage,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    free_port: Callable[[], int],
) -> tuple[Cluster, Books]:
    """Two ingresses before one decode replica."""

    @contextlib.contextmanager
    def start() -> Iterator[Cluster]:
        tmp = tmp_path_factory.mktemp("pair")
        (tmp / "two.yaml").write_text("ingress: {replicas: 2}\n")
        words = ("--prefill", "0", "--model", str(tiny_model), "--config", str(tmp / "two.yaml"))
        memory = ("--engine-arg", "kv_cache_memory_bytes=134217728")
        with running(tmp, tiny_model.parent, free_port(), *words, *memory) as cluster:
            await_that(lambda: len(ingresses(cluster)) == 2, "both ingresses listen", 60)
            _each_serves(cluster)
            cluster.await_rest()
            yield cluster

    return stage.show("pair", start)


@pytest.fixture
def cluster(shared_pair: tuple[Cluster, Books]) -> Iterator[Cluster]:
    cluster, books = shared_pair
    yield cluster
    books.check(cluster)


def _stream(cluster: Cluster, n: int) -> Stream:
    options = {"model": "smollm2", "temperature": 0, "ignore_eos": True, "max_tokens": n}
    return Stream(cluster.url, "/v1/completions", {**options, "prompt": list(range(500, 540))})


def _served_by(cluster: Cluster, stream: Stream) -> int | None:
    """The ingress at the other end of a stream's connection."""
    for pid in ingresses(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            ends = psutil.Process(pid).net_connections("tcp")
            if any(end.raddr and end.raddr.port == stream.port for end in ends):
                return pid
    return None


def _each_serves(cluster: Cluster) -> None:
    """Return once every ingress has answered."""
    seen: set[int | None] = set()

    def all_seen() -> bool:
        stream = _stream(cluster, 20)
        seen.add(_served_by(cluster, stream))
        stream.done()
        return set(ingresses(cluster)) <= seen

    await_that(all_seen, "each ingress has answered", 60)


def _differs(tokens: list[int], truth: list[int]) -> str | None:
    """Where an answer leaves the undisturbed one, if it does."""
    if tokens == truth:
        return None
    pairs = enumerate(zip(tokens, truth, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(tokens), len(truth)))
    return f"{len(tokens)} tokens of {len(truth)}, other ones from {first} on"


@pytest.mark.parametrize("kind", KINDS)
def test_ingress_in_mid_stream(cluster: Cluster, kind: Kind) -> None:
    """The streams of the other ingress go on. The engines end what a lost one had asked for
    within 10 s, and do not wait for its end. A killed one is restarted, while the other takes
    its connections; a stopped one goes on where its streams stood."""
    truth = _stream(cluster, GENERATED).done(60).tokens
    streams = [_stream(cluster, GENERATED) for _ in range(10)]
    by = {stream: _served_by(cluster, stream) for stream in streams}
    await_that(lambda: all(stream.tokens for stream in streams), "streams have begun", 30)
    pid = max(ingresses(cluster), key=list(by.values()).count)
    lost = [stream for stream in streams if by[stream] == pid]
    kept = [stream for stream in streams if by[stream] != pid]
    with struck(kind, pid) as dead:
        if kind == "kill":
            await_that(lambda: not any(s.is_alive() for s in lost), "its streams have ended")
            assert all(len(_stream(cluster, 20).done().tokens) == 20 for _ in range(5))
            await_that(
                lambda: cluster.total("running") <= len(kept), "the rest is aborted", ABORTED_S
            )
        assert [_differs(stream.done().tokens, truth) for stream in kept] == [None] * len(kept)
    if kind == "stop":
        assert [_differs(stream.done().tokens, truth) for stream in lost] == [None] * len(lost)
    await_that(lambda: len(set(ingresses(cluster)) - dead) == 2, "both ingresses listen", 90)
    _each_serves(cluster)
