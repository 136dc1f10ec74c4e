"""API keys: who is let in, as whom, and what a change of the file does."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from router.access import KeyRing, digest, read
from router.context import ServiceClass, bound
from router.errors import AccessError, KeyFileError
from router.guard import Guard
from router.limits import Limits
from router.salt import Salter

KEY, OTHER, ADMIN = "bk-one", "bk-two", "bk-admin"
FILE = f"""
keys:
  - {{sha256: {digest(KEY)}, tenant: acme}}
  - {{sha256: {digest(OTHER)}, tenant: umbrella}}
admin: [{digest(ADMIN)}]
"""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "keys.yaml"
    written.write_text(FILE)
    return written


def test_a_key_names_its_tenant(path: Path) -> None:
    """Known keys give their tenant; none, an unknown one and an admin key are refused."""
    ring = KeyRing(path, Clock())
    assert (ring.tenant(KEY), ring.tenant(OTHER)) == ("acme", "umbrella")
    for wrong in (None, "", "bk-three", ADMIN, digest(KEY), "\ud800"):
        with pytest.raises(AccessError):
            ring.tenant(wrong)


def test_an_admin_key_opens_admin_only(path: Path) -> None:
    """And a tenant's key does not."""
    ring = KeyRing(path, Clock())
    ring.check_admin(ADMIN)
    for wrong in (None, KEY, "bk-three"):
        with pytest.raises(AccessError):
            ring.check_admin(wrong)


def test_a_changed_file_is_in_force_within_a_second(path: Path) -> None:
    """A key that was taken out is refused, a new one is let in, without a restart; a file that
    is half written changes nothing until it is whole."""
    clock = Clock()
    ring = KeyRing(path, clock)
    path.write_text("keys: [{sha256: 12")
    clock.now_s += 2
    assert ring.tenant(KEY) == "acme"
    path.write_text(f"keys:\n  - {{sha256: {digest('bk-new')}, tenant: acme}}\n")
    clock.now_s += 2
    assert ring.tenant("bk-new") == "acme"
    with pytest.raises(AccessError):
        ring.tenant(KEY)
    path.unlink()
    clock.now_s += 2
    assert ring.tenant("bk-new") == "acme"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [{sha256: abc, tenant: a}]", "SHA-256"),
        (f"keys: [{{sha256: {digest(KEY).upper()}, tenant: a}}]", "SHA-256"),
        (f"keys: [{{sha256: {digest(KEY)}}}]", "tenant"),
        ("kees: []", "kees"),
        ("[", "flow"),
        ("admin: [plain-text-key]", "SHA-256"),
        ("tenants: {acme: {max_requests: 1}}", "tenants.acme is set, and no key"),
        (f"{FILE}tenants: {{acne: {{max_requests: 1}}}}", "tenants.acne"),
        (f"{FILE}tenants: {{acme: {{max_request: 1}}}}", "max_request"),
        (f"{FILE}tenants: {{acme: {{max_requests: 0}}}}", ">= 1"),
        (f"{FILE}tenants: {{acme: {{tokens_per_minute: -5}}}}", ">= 1"),
        (f"{FILE}tenants: {{acme: {{tokens_per_minute: 1.5}}}}", "int"),
        (f"{FILE}tenants: {{acme: 8}}", "object"),
        (f"{FILE}tenants: {{acme: {{service_tier: priority}}}}", "service_tier"),
        (f"{FILE}tenants: {{acme: {{service_tier: 1}}}}", "service_tier"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """At start a file that cannot be used is an error that names it, and shows no key whole."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        read(path)
    assert "keys.yaml" in str(caught.value)
    assert says in str(caught.value)
    assert "plain-text-key" not in str(caught.value)


def test_limits_change_with_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tenant has the limits of its lines, others have none; a new file is in force without a
    restart, and one that is refused is told in the log, once."""
    clock = Clock()
    ring = KeyRing(path, clock)
    assert ring.limits("acme") is None
    path.write_text(f"{FILE}tenants: {{acme: {{max_requests: 8, tokens_per_minute: 60000}}}}\n")
    clock.now_s += 2
    ring.tenant(KEY)
    assert ring.limits("acme") == Limits(max_requests=8, tokens_per_minute=60000)
    assert ring.limits("umbrella") is None
    path.write_text(f"{FILE}tenants: {{acme: {{max_requests: -8}}}}\n# of another length")
    for _ in range(3):
        clock.now_s += 2
        ring.tenant(KEY)
    assert ring.limits("acme") == Limits(max_requests=8, tokens_per_minute=60000)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "max_requests" in caplog.text


@pytest.fixture
def flexible(path: Path) -> Path:
    """Keys of two tenants; the requests of one are of the batch class."""
    path.write_text(f"{FILE}tenants: {{acme: {{service_tier: flex}}}}\n")
    return path


def test_a_tenant_s_requests_are_of_its_class(flexible: Path) -> None:
    """Unless they say otherwise; a tenant with a class and no limits is not limited."""
    ring = KeyRing(flexible, Clock())
    assert ring.service_class("acme") is ServiceClass.BATCH
    assert ring.limits("acme") is None
    assert ring.service_class("umbrella") is ServiceClass.INTERACTIVE


@pytest.mark.parametrize(
    ("sent", "used"),
    [
        ({}, "batch"),
        ({"service_tier": "auto"}, "batch"),
        ({"service_tier": "default"}, "interactive"),
    ],
)
async def test_a_class_is_bound_by_key_and_body(
    flexible: Path, sent: dict[str, str], used: str
) -> None:
    """The key says what is usual, the body what is wanted."""
    status, seen = await _ask(flexible, {"x-api-key": KEY}, sent)
    assert (status, seen["class"]) == (200, used)


async def _ask(
    path: Path, headers: dict[str, str], body: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked = bound.get()
        assert asked is not None
        names = [name.decode() for name, _ in scope["headers"]]
        context = asked.context
        seen = {"tenant": context.tenant, "headers": names, "class": context.service_class}
        await JSONResponse(seen)(scope, receive, send)

    guard = Guard(app, 1000, keys=KeyRing(path, Clock()))
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://guard") as http:
        content = json.dumps(body or {})
        reply = await http.post("/v1/completions", content=content, headers=headers)
    return reply.status_code, reply.json()


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
    ],
)
async def test_a_request_with_a_key_is_its_tenant_s(path: Path, headers: dict[str, str]) -> None:
    """OpenAI's and Anthropic's way of sending a key; the key itself goes no further."""
    status, seen = await _ask(path, headers)
    assert (status, seen["tenant"]) == (200, "acme")
    assert not {"authorization", "x-api-key"} & set(seen["headers"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer nope"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {ADMIN}"},
        {"x-api-key": digest(KEY)},
    ],
)
async def test_a_request_without_a_known_key_is_401(path: Path, headers: dict[str, str]) -> None:
    """The refusal is OpenAI-shaped, and does not repeat what was sent."""
    status, seen = await _ask(path, headers)
    assert status == 401
    assert seen["error"]["type"] == "AuthenticationError"
    assert "nope" not in seen["error"]["message"]


@given(st.text(), st.text(), st.none() | st.text(), st.none() | st.text())
def test_with_keys_no_two_tenants_share_a_salt(
    one: str, two: str, salt: str | None, other: str | None
) -> None:
    """Whatever salts they choose, or none; and within a tenant the same salt is the same name."""
    salter = Salter(b"secret", separate=True)
    if one != two:
        assert salter.salt(one, salt) != salter.salt(two, other)
    assert salter.salt(one, salt) == salter.salt(one, salt)
    assert salter.salt(one, salt) is not None


def test_without_keys_there_is_one_shared_namespace() -> None:
    """Nobody to keep apart; a client's own salt still is one."""
    salter = Salter(b"secret", separate=False)
    assert salter.salt("default", None) is None
    assert salter.salt("default", "mine") not in (None, "mine")
