"""More requests than fit: of everybody at once, and of one tenant. One real cluster serves all."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI, RateLimitError

from router.access import digest
from tests.fault.stage import Stage
from tests.flow.cluster_process import Cluster, start

pytestmark = [pytest.mark.engine, pytest.mark.real_model]
MAX_REQUESTS = 64
BURST = 200
TENANTS = {"few": "{max_requests: 4}", "slow": "{tokens_per_minute: 60}"}


@pytest.fixture(scope="module")
def shared(
    stage: Stage,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    free_port: Callable[[], int],
) -> Iterator[Cluster]:
    stage.clear()
    tmp = tmp_path_factory.mktemp("burst")
    keys, config = tmp / "keys.yaml", tmp / "config.yaml"
    lines = [f"  - {{sha256: {digest(name)}, tenant: {name}}}" for name in ("free", *TENANTS)]
    limits = [f"  {name}: {given}" for name, given in TENANTS.items()]
    keys.write_text(
        "\n".join(["keys:", *lines, "tenants:", *limits, f"admin: [{digest('root')}]", ""])
    )
    config.write_text(f"ingress: {{keys_file: {keys}, max_requests: {MAX_REQUESTS}}}\n")
    words = ("--config", str(config), "--prefill", "1", "--decode", "1")
    model = ("--model", str(tiny_model), "--engine-arg", "kv_cache_memory_bytes=67108864")
    started = start(tmp / "run", tiny_model.parent, free_port(), *words, *model)
    cluster = replace(started, admin_key="root")
    yield cluster
    cluster.command("down")
    cluster.process.wait(30)


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The cluster, whose books must balance after the test."""
    yield shared
    shared.await_rest()


@dataclass(frozen=True)
class Outcome:
    """What came of one request; a stream is `whole` if it ended as streams do."""

    reply: httpx.Response
    after_s: float

    @property
    def whole(self) -> bool:
        if self.reply.status_code != 200:
            return False
        if "text/event-stream" not in self.reply.headers["content-type"]:
            return bool(self.reply.json()["usage"]["completion_tokens"])
        return self.reply.text.rstrip().endswith("[DONE]") and '"error":' not in self.reply.text


def _body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "prompt": [5, 6, 7, 8],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **fields,
    }


async def _at_once(
    cluster: Cluster, key: str, bodies: list[dict[str, Any]], path: str = "/v1/completions"
) -> list[Outcome]:
    headers = {"authorization": f"Bearer {key}"}
    unlimited = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=120, limits=unlimited) as client:

        async def one(body: dict[str, Any]) -> Outcome:
            began = time.monotonic()
            reply = await client.post(cluster.url + path, json=body)
            return Outcome(reply, time.monotonic() - began)

        return await asyncio.gather(*map(one, bodies))


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
async def test_a_burst_is_answered_or_refused_at_once(cluster: Cluster, again: bool) -> None:
    """Of 200 at once, streams and others in turn, as many as fit are answered whole, all others
    are 503 with Retry-After before the first answer ends, and none hangs. The second burst finds
    as many places as the first."""
    bodies = [_body(400, stream=bool(number % 2)) for number in range(BURST)]
    outcomes = await _at_once(cluster, "free", bodies)
    answered = [each for each in outcomes if each.reply.status_code == 200]
    refused = [each for each in outcomes if each.reply.status_code == 503]
    assert (len(answered), len(refused)) == (MAX_REQUESTS, BURST - MAX_REQUESTS)
    assert [each.reply.text[-400:] for each in answered if not each.whole] == []
    assert {each.reply.headers["retry-after"] for each in refused} == {"1"}
    assert all("64 allowed" in each.reply.json()["error"]["message"] for each in refused)
    assert max(each.after_s for each in refused) < min(each.after_s for each in answered)


async def test_calls_of_many_choices_take_as_many_places(cluster: Cluster) -> None:
    """Ten streams of ten choices: six calls fit into 64 places, the others are refused whole."""
    bodies = [_body(200, stream=True, n=10, temperature=1.0) for _ in range(10)]
    outcomes = await _at_once(cluster, "free", bodies)
    assert sorted(each.reply.status_code for each in outcomes) == [200] * 6 + [503] * 4
    assert sum(each.whole for each in outcomes) == 6
    assert [each.whole for each in await _at_once(cluster, "free", [_body(1)])] == [True]


async def test_a_tenant_s_requests_in_flight_are_bounded(cluster: Cluster) -> None:
    """Of twelve at once four are answered, streams too, and eight are 429; then all four places
    are free again. Other tenants do not notice."""
    bodies = [_body(200, stream=bool(number % 2)) for number in range(12)]
    mine, others = await asyncio.gather(
        _at_once(cluster, "few", bodies), _at_once(cluster, "free", [_body(20)] * 6)
    )
    assert all(each.whole for each in others)
    assert not any("x-ratelimit" in name for each in others for name in each.reply.headers)
    answered = [each for each in mine if each.whole]
    refused = [each for each in mine if each.reply.status_code == 429]
    assert (len(answered), len(refused)) == (4, 8)
    left = sorted(each.reply.headers["x-ratelimit-remaining-requests"] for each in answered)
    assert left == ["0", "1", "2", "3"]
    for each in refused:
        assert each.reply.headers["retry-after"] == "1"
        assert each.reply.headers["x-ratelimit-limit-requests"] == "4"
        assert each.reply.json()["error"]["type"] == "rate_limit_error"
    afterwards = await _at_once(cluster, "few", [_body(5)] * 4)
    assert all(each.whole for each in afterwards)


async def test_clients_that_leave_take_no_place_with_them(cluster: Cluster) -> None:
    """A tenant whose clients all leave in mid-stream has all its places again."""
    headers = {"authorization": "Bearer few"}
    for _ in range(3):
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            for _ in range(4):
                body = _body(2000, stream=True)
                request = client.build_request("POST", f"{cluster.url}/v1/completions", json=body)
                reply = await client.send(request, stream=True)
                assert reply.status_code == 200
        await asyncio.sleep(1.0)
    [after] = await _at_once(cluster, "few", [_body(1)])
    assert after.reply.headers["x-ratelimit-remaining-requests"] == "3"


def test_a_tenant_s_tokens_a_minute_are_bounded(cluster: Cluster) -> None:
    """By the SDK: a stream that uses more than there is goes to its end; the next request is a
    RateLimitError that says how long, and after so long one is answered again. What is left falls
    by what `usage` counts. Listing models goes on."""
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="slow", max_retries=0, timeout=60)
    ask = client.completions.with_raw_response
    fields = {"model": "smollm2", "prompt": [5, 6, 7, 8], "extra_body": {"ignore_eos": True}}
    first = ask.create(max_tokens=6, **fields)
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    assert first.headers["x-ratelimit-remaining-tokens"] == "60"
    assert first.parse().usage.total_tokens == 10
    stream = client.completions.create(max_tokens=60, stream=True, **fields)
    assert 50 <= int(stream.response.headers["x-ratelimit-remaining-tokens"]) <= 55
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(RateLimitError) as caught:
        ask.create(max_tokens=1, **fields)
    told = caught.value.response
    wait_s = int(told.headers["retry-after"])
    assert 1 <= wait_s <= 15
    assert told.headers["x-ratelimit-remaining-tokens"] == "0"
    assert told.headers["x-ratelimit-reset-tokens"].startswith("1m")
    error = json.loads(told.text)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", 429)
    assert "tenant slow: 60 tokens a minute" in error["message"]
    assert client.models.list().data
    time.sleep(wait_s)
    assert ask.create(max_tokens=1, **fields).parse().usage.completion_tokens == 1
