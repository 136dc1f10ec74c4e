"""An operator's order to drop what one replica caches."""

import asyncio
from dataclasses import dataclass, field
from typing import cast

import httpx
from prometheus_client import CollectorRegistry

from router.admin import Admin
from router.decisions import Decisions
from router.entry import Scribe
from router.fleet import Fleet
from router.member import Member
from router.orders import InForce, Order, Orders
from router.policy_admin import PolicyAdmin
from router.probing import Probing
from router.salt import Salter
from router.shadow import Shadow
from router.targets import TargetDirectory
from router.vault import VaultView
from workers.messages import Request, Reset, Role
from workers.sim import SimCosts, sim_replica


@dataclass(slots=True)
class NotingLink:
    """Notes what is sent."""

    sent: list[Request] = field(default_factory=list)

    def send(self, request: Request) -> None:
        self.sent.append(request)

    def close(self) -> None:
        pass


class OneReplica:
    """As much of a fleet as the order needs."""

    def __init__(self, link: NotingLink) -> None:
        replica = sim_replica("decode-0", Role.DECODE, SimCosts())
        now = asyncio.get_running_loop().time
        self._member = Member(replica, lambda _: link, lambda *_: None, now)

    def member(self, name: str) -> Member | None:
        return self._member if name == self._member.name else None


async def test_the_replica_that_is_named_hears_of_it() -> None:
    """And of one that is not there the answer says so; other words are refused."""
    link = NotingLink()
    app = Admin(
        cast(Fleet, OneReplica(link)),
        Decisions((), cast(Scribe, None)),
        CollectorRegistry(),
        None,
        PolicyAdmin(InForce(Order(), cast(Orders, None)), Shadow()),
        Salter(b"s", False),
        cast(VaultView, None),
        cast(Probing, None),
        cast(TargetDirectory, None),
    ).app()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        gone = await client.post("/admin/reset", json={"replica": "decode-1"})
        assert (gone.status_code, link.sent) == (404, [])
        assert "decode-1" in gone.json()["error"]["message"]
        assert (await client.post("/admin/reset", json={})).status_code == 400
        assert (await client.get("/admin/reset")).status_code == 405
        assert (await client.post("/admin/reset", json={"replica": "decode-0"})).status_code == 202
    assert link.sent == [Reset()]
