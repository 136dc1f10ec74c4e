"""`/admin/decisions`: which records it gives, and what it refuses."""

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from kv.audit import Entry, read
from router.decisions import Decisions
from router.entry import Scribe
from router.pseudonyms import Pseudonyms
from tests.unit.router.audited import LOCAL, Clock, audit_of, remote, request


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Four requests, of which the third has the id of the first and the last one runs."""
    clock = Clock()
    audit = audit_of(clock)
    for name in ("a", 'b"\\', "a"):
        clock.now_s = 100.0
        remote(clock, audit, request(name))
    audit.open(request("running"), LOCAL, clock.now_s)
    scribe = Scribe(Pseudonyms(b"secret"), "smollm2", clock, Clock(5000.0))
    answer = Decisions(audit.records, scribe).answer
    app = Starlette(routes=[Route("/admin/decisions", answer)])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as made:
        yield made


async def ids(client: httpx.AsyncClient, **query: str) -> list[str]:
    answer = await client.get("/admin/decisions", params=query)
    assert answer.status_code == 200, answer.text
    return [row["request_id"] for row in answer.json()["decisions"]]


async def test_all_are_given_the_newest_last(client: httpx.AsyncClient) -> None:
    """As they were planned."""
    assert await ids(client) == ["a", 'b"\\', "a", "running"]


async def test_a_request_id_picks_every_request_that_had_it(client: httpx.AsyncClient) -> None:
    """Clients may give an id twice; whatever characters it has, it is taken as it is."""
    assert await ids(client, request_id="a") == ["a", "a"]
    assert await ids(client, request_id='b"\\') == ['b"\\']
    assert await ids(client, request_id="nobody") == []


async def test_a_limit_keeps_the_last(client: httpx.AsyncClient) -> None:
    """Of those that are asked for."""
    assert await ids(client, limit="2") == ["a", "running"]
    assert await ids(client, limit="1", request_id="a") == ["a"]
    assert await ids(client, limit="1000") == await ids(client)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "'0'"),
        ("limit=1001", "from 1 to 1000"),
        ("limit=-1", "'-1'"),
        ("limit=1e3", "'1e3'"),
        ("limit=", "''"),
        ("limit=%D9%A1", "whole number"),  # a digit, of another alphabet
        ("limit=" + "9" * 5000, "from 1 to 1000"),
        ("request_id=", "1 to 128 visible characters"),
        ("request_id=a%0Ab", "1 to 128 visible characters"),
        ("request_id=a%00", "1 to 128 visible characters"),
        ("request_id=%F0%9F%8D%8E", "1 to 128 visible characters"),
        ("request_id=" + "a" * 129, "1 to 128 visible characters"),
        ("request_id=a&request_id=b", "given twice"),
        ("requestid=a", "'requestid' is no filter"),
        ("%3Cscript%3E=1", "'<script>' is no filter"),
    ],
)
async def test_what_is_no_filter_is_refused(
    client: httpx.AsyncClient, query: str, says: str
) -> None:
    """In words, and without giving back more of it than fits into a line."""
    answer = await client.get(f"/admin/decisions?{query}")
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert says in message
    assert len(message) < 200


async def test_a_row_holds_the_entry_without_its_blocks(client: httpx.AsyncClient) -> None:
    """What the file will hold of it, in the same form."""
    answer = await client.get("/admin/decisions", params={"request_id": "running"})
    row = answer.json()["decisions"][0]
    assert (row["outcome"], row["audit"]["outcome"]) == ("running", "running")
    rows = (await client.get("/admin/decisions")).json()["decisions"]
    lines = [httpx.Response(200, json=each["audit"]).content for each in rows]
    entries: list[Entry] = list(read(lines, lambda bad: pytest.fail(str(bad))))
    assert [entry.request_id for entry in entries] == [each["request_id"] for each in rows]
    assert {entry.asked.blocks for entry in entries} == {b""}
