"""Requests that change something under /admin: only programs that mean it may send them."""

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.changes import changing

JSON = {"content-type": "application/json"}


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str


async def ask(headers: dict[str, str], body: bytes = b'{"tenant": "acme"}') -> httpx.Response:
    """An answer of 200 says what was carried out."""

    async def carry_out(wish: Wish) -> Response:
        return JSONResponse({"did": wish.tenant})

    app = Starlette(
        routes=[Route("/admin/wish", changing(Wish, carry_out, False, "{}"), methods=["POST"])]
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster") as client:
        return await client.post("/admin/wish", content=body, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [JSON, {"content-type": "Application/JSON; charset=utf-8"}, {**JSON, "sec-fetch-site": "none"}],
)
async def test_a_program_is_heard(headers: dict[str, str]) -> None:
    """JSON that nothing says a page has sent is carried out."""
    answer = await ask(headers)
    assert (answer.status_code, answer.json()) == (200, {"did": "acme"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "origin": "http://evil.example"}, 403),
        ({**JSON, "origin": "null"}, 403),
        # What a page reaches by a name that it has made to point here.
        ({**JSON, "origin": "http://cluster", "sec-fetch-site": "same-origin"}, 403),
        ({**JSON, "sec-fetch-site": "cross-site"}, 403),
    ],
)
async def test_a_page_in_a_browser_is_not(headers: dict[str, str], status: int) -> None:
    """Without JSON no browser asks before it sends; with it every browser names the origin."""
    answer = await ask(headers)
    assert answer.status_code == status
    assert "did" not in answer.json()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"tenant": 7}', 400),
        (b'{"tenant": "a", "all": true}', 400),
        (b'{"tenant": "\xff"}', 400),
        (b" " * 70_000, 413),
    ],
)
async def test_a_body_that_is_none_of_ours_is_refused(body: bytes, status: int) -> None:
    """With a word on what is wrong."""
    answer = await ask(JSON, body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
