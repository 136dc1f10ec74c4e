"""Orders: what several ingresses go by, and what becomes of them when the store is away."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import Route

from router.access import KeyRing, digest
from router.admin import Admin
from router.changes import changing
from router.decisions import Decisions
from router.entry import Scribe
from router.errors import OrderError
from router.fleet import Fleet
from router.metrics import PolicyMetrics
from router.orders import FOLLOW_EVERY_S, Change, InForce, Order
from router.policy import Policy
from router.policy_admin import EXAMPLE, PolicyAdmin
from router.probing import Probing
from router.salt import Salter
from router.shadow import Shadow
from router.targets import TargetDirectory
from router.vault import VaultView

pytestmark = pytest.mark.looptime(start=0, idle_timeout=0, noop_cycles=1)

CONFIGURED = Order(Policy.BREAKEVEN, Policy.ROUND_ROBIN)


class Store:
    """One for all ingresses, as GCS is; `down` refuses and `hung` never answers."""

    def __init__(self) -> None:
        self.order: Order | None = None
        self.down = self.hung = False

    async def read(self) -> Order | None:
        await self._answer()
        return self.order

    async def write(self, order: Order) -> None:
        await self._answer()
        self.order = order

    async def _answer(self) -> None:
        if self.hung:
            await asyncio.sleep(1e6)
        if self.down:
            raise ConnectionError("GCS does not answer: refused")
        await asyncio.sleep(0.01)


async def test_an_order_to_one_ingress_reaches_all() -> None:
    """The one that is asked goes by it at once, the others within a second and a bit."""
    store = Store()
    first, second = InForce(CONFIGURED, store), InForce(CONFIGURED, store)
    tasks = [asyncio.create_task(each.follow()) for each in (first, second)]
    await asyncio.sleep(0.5)
    await first.change(Change(policy=Policy.LEAST_LOADED))
    assert first.order() == Order(Policy.LEAST_LOADED, Policy.ROUND_ROBIN)
    await asyncio.sleep(FOLLOW_EVERY_S + 0.1)
    assert second.order() == first.order()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_change_keeps_what_another_ingress_was_just_ordered() -> None:
    """A shadow ordered at one ingress does not undo the kill switch pulled at another."""
    store = Store()
    first, second = InForce(CONFIGURED, store), InForce(CONFIGURED, store)
    await first.change(Change(policy=Policy.LEAST_LOADED))
    await second.change(Change(shadow=None))
    assert store.order == second.order() == Order(Policy.LEAST_LOADED, None)


async def test_an_order_survives_an_ingress() -> None:
    """A new ingress of the cluster begins under the order, once it looked."""
    store = Store()
    await InForce(CONFIGURED, store).change(Change(policy=Policy.LEAST_LOADED))
    again = InForce(CONFIGURED, store)
    await again.look()
    assert again.order().policy is Policy.LEAST_LOADED


@pytest.mark.parametrize("trouble", ["down", "hung"])
async def test_without_its_store_an_order_is_refused_and_the_last_one_stays(trouble: str) -> None:
    """The operator hears why within seconds; what was in force goes on; later orders are taken."""
    store = Store()
    ingress = InForce(CONFIGURED, store)
    before = await ingress.change(Change(policy=Policy.LEAST_LOADED))
    setattr(store, trouble, True)
    began = asyncio.get_running_loop().time()
    with pytest.raises(OrderError, match="last one stays in force"):
        await ingress.change(Change(policy=Policy.BREAKEVEN))
    assert asyncio.get_running_loop().time() - began < 4.0
    assert ingress.order() == store.order == before
    setattr(store, trouble, False)
    assert (await ingress.change(Change(policy=Policy.BREAKEVEN))).policy is Policy.BREAKEVEN


async def test_a_follower_outlives_its_store(caplog: pytest.LogCaptureFixture) -> None:
    """While the store is away a follower goes on and says so once; a store that lost the order
    does not take it out of force."""
    store = Store()
    ingress = InForce(CONFIGURED, store)
    await ingress.change(Change(policy=Policy.LEAST_LOADED))
    task = asyncio.create_task(ingress.follow())
    store.down = True
    await asyncio.sleep(10.0)
    assert sum("stays in force" in record.message for record in caplog.records) == 1
    store.down, store.order = False, None
    await asyncio.sleep(3.0)
    assert ingress.order().policy is Policy.LEAST_LOADED
    store.order = Order(Policy.ROUND_ROBIN)
    await asyncio.sleep(3.0)
    assert ingress.order() == store.order
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


Ask = Callable[..., Any]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def ask(store: Store) -> Ask:
    """Sends an order to an ingress's endpoints; keywords are headers."""
    admin = PolicyAdmin(InForce(CONFIGURED, store), Shadow())
    methods = {"GET": admin.policy, "POST": changing(Change, admin.order, True, EXAMPLE)}
    app = Starlette(
        routes=[Route("/admin/policy", each, methods=[name]) for name, each in methods.items()]
    )

    async def send(body: str | None, base: str = "http://127.0.0.1:8000", **headers: str) -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            if body is None:
                return await client.get("/admin/policy")
            sent = {"content-type": "application/json", **headers}
            sent = {name.replace("_", "-"): value for name, value in sent.items() if value}
            return await client.post("/admin/policy", content=body, headers=sent)

    return send


async def test_an_order_is_answered_with_what_is_in_force(ask: Ask, store: Store) -> None:
    """And a look says the same, beside what is configured."""
    ordered = await ask('{"policy": "least_loaded", "shadow": "breakeven"}')
    looked = await ask(None)
    assert ordered.status_code == looked.status_code == 200
    assert ordered.json() == looked.json()
    assert looked.json()["policy"] == "least_loaded"
    assert looked.json()["shadow"] == "breakeven"
    assert looked.json()["configured"] == {"policy": "breakeven", "shadow": "round_robin"}
    assert store.order == Order(Policy.LEAST_LOADED, Policy.BREAKEVEN)


async def test_every_name_of_loopback_may_order(ask: Ask) -> None:
    """The check of the host is for names that others made to point here."""
    for base in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
        assert (await ask('{"shadow": null}', base)).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ("", {}, 400),
        ("{}", {}, 400),
        ('{"policy": "x"}', {}, 400),
        ('{"policy": null}', {}, 400),
        ('{"policy": 1}', {}, 400),
        ('["least_loaded"]', {}, 400),
        ('{"policy": "least_loaded", "more": 1}', {}, 400),
        ("[" * 4000, {}, 400),
        (" " * 70_000, {}, 413),
        ('{"policy": "\udcff"}', {}, 400),
        ('{"policy": "least_loaded"}', {"content-type": "text/plain"}, 415),
        ('{"policy": "least_loaded"}', {"content-type": ""}, 415),
        ('{"policy": "least_loaded"}', {"origin": "null"}, 403),
        ('{"policy": "least_loaded"}', {"origin": "http://127.0.0.1:9"}, 403),
        ('{"policy": "least_loaded"}', {"origin": "http://e.com", "host": "e.com"}, 403),
        ('{"policy": "least_loaded"}', {"host": "127.0.0.1.e.com"}, 403),
        ('{"policy": "least_loaded"}', {"host": "["}, 403),
    ],
)
async def test_what_is_no_order_changes_nothing(
    ask: Ask, store: Store, body: str, headers: dict[str, str], status: int
) -> None:
    """Bad input and what another site may have made a browser send: a message, and no order."""
    answer = await ask(body.encode("utf-8", "surrogateescape"), **headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert store.order is None


async def test_a_store_that_is_down_is_503(ask: Ask, store: Store) -> None:
    """With the reason."""
    store.down = True
    answer = await ask('{"policy": "least_loaded"}')
    assert answer.status_code == 503
    assert "GCS does not answer" in answer.json()["error"]["message"]


async def test_with_keys_only_the_admin_key_orders(store: Store, tmp_path: Path) -> None:
    """Neither nobody nor a tenant changes the policy, or sees it."""
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"keys: [{{sha256: {digest('acme')}, tenant: acme}}]\nadmin: [{digest('root')}]\n"
    )
    admin = PolicyAdmin(InForce(CONFIGURED, store), Shadow())
    ring = KeyRing(path, asyncio.get_running_loop().time)
    # The replicas and decisions of an ingress are not asked for here.
    fleet, vault = cast(Fleet, None), cast(VaultView, None)
    decisions, salter = Decisions((), cast(Scribe, None)), Salter(b"s", True)
    probing, others = cast(Probing, None), cast(TargetDirectory, None)
    told = (ring, admin, salter, vault, probing, others)
    app = Admin(fleet, decisions, CollectorRegistry(), *told).app()
    base = "https://cluster.example.com"
    order = {"policy": "least_loaded"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        for headers in ({}, {"x-api-key": "acme"}, {"authorization": "Bearer acme"}):
            posted = await client.post("/admin/policy", json=order, headers=headers)
            assert posted.status_code == 401
            for path_of in ("/admin/policy", "/admin/shadow"):
                assert (await client.get(path_of, headers=headers)).status_code == 401
        assert store.order is None
        root = {"authorization": "Bearer root"}
        ordered = await client.post("/admin/policy", json=order, headers=root)
        assert ordered.status_code == 200
        assert (await client.get("/admin/policy", headers=root)).json() == ordered.json()
        assert (await client.get("/admin/shadow", headers=root)).json() == {"shadows": []}
        assert (await client.put("/admin/policy", headers=root)).status_code == 405


async def test_the_metric_is_1_for_the_policy_in_force() -> None:
    """And 0 for every other one."""
    ingress, registry = InForce(CONFIGURED, Store()), CollectorRegistry()
    registry.register(PolicyMetrics(ingress.order, Shadow()))

    def shown() -> set[str]:
        values = {p: registry.get_sample_value("breakeven_policy", {"policy": p}) for p in Policy}
        assert set(values.values()) == {0.0, 1.0}
        return {policy for policy, value in values.items() if value}

    assert shown() == {"breakeven"}
    await ingress.change(Change(policy=Policy.LEAST_LOADED))
    assert shown() == {"least_loaded"}
