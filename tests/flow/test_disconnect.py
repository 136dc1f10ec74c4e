"""Clients that leave: their requests end on every engine, and nothing stays pinned."""

import json
import random
import socket
import time

import httpx
import pytest

from tests.flow.cluster_process import Cluster

pytestmark = pytest.mark.real_model


def _body(prompt_tokens: int, seed: int, stream: bool = True) -> dict[str, object]:
    rng = random.Random(seed)
    prompt = [rng.randrange(1000, 20000) for _ in range(prompt_tokens)]
    options = {"max_tokens": 2000, "temperature": 0, "stream": stream, "ignore_eos": True}
    return {"model": "smollm2", "prompt": prompt, **options}


def _leave_after(cluster: Cluster, body: dict[str, object], seconds: float) -> None:
    """Send a request over a socket and close it after a while, whatever has come back."""
    port = int(cluster.url.rsplit(":", 1)[1])
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + content)
        time.sleep(seconds)


def test_leaving_a_stream_frees_the_decode_replica_within_a_second(cluster: Cluster) -> None:
    """A dropped stream stops decoding and frees its pages at once."""
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=_body(200, 1)) as answer,
    ):
        chunks = answer.iter_lines()
        for _ in range(6):
            next(chunks)
        while cluster.replicas()["decode-0"]["running"] != 1:  # the report lags by a beat
            next(chunks)
    cluster.await_rest(timeout_s=1.5)


def test_leaving_during_prefill_frees_the_prefill_replica(cluster: Cluster) -> None:
    """A client that leaves while its long prompt is being computed stops the computing: the
    engine is free after the chunk that it is in."""
    _leave_after(cluster, _body(6000, 2), 0.5)
    cluster.await_rest(timeout_s=2.0)


def test_leaving_without_streaming_frees_everything(cluster: Cluster) -> None:
    """The same for a plain request, whose handler sees the disconnect another way."""
    _leave_after(cluster, _body(300, 3, stream=False), 1.5)
    cluster.await_rest(timeout_s=1.5)


def test_leaving_at_any_moment_leaves_no_lease(cluster: Cluster) -> None:
    """Clients that leave around the end of their prefill, some just between prefill and
    decode, leave no block pinned for its lease of 30 s."""
    for number in range(12):
        _leave_after(cluster, _body(160, 100 + number), 0.15 + 0.03 * number)
    started = time.monotonic()
    cluster.await_rest(timeout_s=5.0)
    assert time.monotonic() - started < 5.0
    assert cluster.total("failed_transfers") == 0
