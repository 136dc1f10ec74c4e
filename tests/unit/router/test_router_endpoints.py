"""Where ingresses and catalogues answer Prometheus."""

import asyncio
from collections.abc import Sequence
from typing import cast

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette

from router.admin import Admin
from router.catalogue.metrics import CatalogueMetrics
from router.catalogue.wire import Beat
from router.decisions import Decisions
from router.endpoint import IngressEndpoint
from router.entry import Scribe
from router.fleet import Fleet
from router.policy_admin import PolicyAdmin
from router.probing import Probing
from router.salt import Salter
from router.targets import Target
from router.vault import ShardDirectory, VaultView


class OneIngress:
    """A directory; None is one that does not answer."""

    def __init__(self, found: Sequence[Target] | None) -> None:
        self.found = found

    async def targets(self) -> Sequence[Target]:
        if self.found is None:
            raise ConnectionError("GCS does not answer")
        return self.found


class Nobody:
    """A fleet without replicas."""

    def members(self) -> tuple[()]:
        return ()


def _app(directory: OneIngress) -> Starlette:
    return Admin(
        cast(Fleet, Nobody()),
        Decisions((), cast(Scribe, None)),
        CollectorRegistry(),
        None,
        cast(PolicyAdmin, _Policies()),
        Salter(b"s", False),
        VaultView(cast(ShardDirectory, None)),
        cast(Probing, None),
        directory,
    ).app()


async def _told(app: Starlette) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return await client.get("/metrics/targets")


class _Policies:
    policy = shadow = order = None


async def test_ingresses_and_catalogues_are_among_the_targets() -> None:
    """Also while the directory does not answer: Prometheus scrapes whom it is told of, and nobody
    else. Before it ever did there is nothing to tell, and Prometheus keeps what it has."""
    directory = OneIngress([Target(["127.0.0.1:4000"], {"ingress": "ingress-0"})])
    app = _app(directory)
    first = await _told(app)
    assert first.json() == [{"targets": ["127.0.0.1:4000"], "labels": {"ingress": "ingress-0"}}]
    directory.found = None
    assert (await _told(app)).json() == first.json()
    assert (await _told(_app(directory))).status_code == 503


async def test_two_ingresses_answer_each_for_itself() -> None:
    """Each at an address of its own, until it is cancelled."""
    endpoints, tasks = [], []
    for count in (1, 2):
        registry = CollectorRegistry()
        Counter("breakeven_requests", "", registry=registry).inc(count)
        endpoints.append(IngressEndpoint("127.0.0.1", registry))
        tasks.append(asyncio.create_task(endpoints[-1].serve()))
    async with httpx.AsyncClient() as client:
        for count, endpoint in enumerate(endpoints, start=1):
            answer = await client.get(f"http://{endpoint.address}/metrics")
            assert f"breakeven_requests_total {count}.0" in answer.text
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{endpoints[0].address}/metrics")
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_catalogue_tells_its_last_beat() -> None:
    """Blocks of all replicas, how many those are, how late it is, whom it answers."""
    beats = [Beat(1, {"a": 3, "b": 4}, 0.5, 0.1)]
    metrics = CatalogueMetrics(lambda: beats[0], lambda: 2)
    found = {family.name: family.samples[0].value for family in metrics.collect()}
    assert found == {
        "breakeven_catalogue_node_blocks": 7,
        "breakeven_catalogue_node_replicas": 2,
        "breakeven_catalogue_node_lag_seconds": 0.5,
        "breakeven_catalogue_node_ingresses": 2,
    }
