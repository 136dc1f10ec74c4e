"""The OpenAI surface, with the real SDK; and what happens to input that is wrong."""

import concurrent.futures
import json
import time
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.flow.cluster_process import Cluster

pytestmark = pytest.mark.real_model
ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_answers(client: OpenAI) -> None:
    """The real model, through its chat template, knows this one."""
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_chat_carries_usage(client: OpenAI) -> None:
    """Chunks add up to the answer, and the last one counts true tokens."""
    stream = client.chat.completions.create(
        model="smollm2",
        messages=ASK,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "The capital of France is Paris."
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (37, 8)


def test_n_choices_and_seeds(client: OpenAI) -> None:
    """`n` gives n choices; the same seed gives the same ones again, another seed others."""

    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="smollm2", messages=ASK, max_tokens=16, temperature=1.5, n=3, seed=seed
        )
        return [choice.message.content for choice in answer.choices]

    first, again, other = ask(7), ask(7), ask(8)
    assert len(first) == 3
    assert first == again != other


def test_stop_strings_end_an_answer(client: OpenAI) -> None:
    """Generation ends before a stop string, which is not part of the text."""
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=12, temperature=0, stop=[" France"]
    )
    assert answer.choices[0].message.content == "The capital of"
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client: OpenAI) -> None:
    """Top logprobs of generated tokens, the chosen greedy token first."""
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    for token in answer.choices[0].logprobs.content or []:
        assert len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token
        assert token.logprob <= 0


def test_prompt_logprobs_are_computed_where_the_answer_is(client: OpenAI) -> None:
    """`echo` with logprobs needs every position's logits, so the plan is local and says why."""
    raw = client.completions.with_raw_response.create(
        model="smollm2", prompt="The sky is", max_tokens=2, temperature=0, echo=True, logprobs=1
    )
    assert "reason=prompt_logprobs" in raw.headers["x-breakeven-plan"]
    logprobs = raw.parse().choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 5


def test_json_schema_output(client: OpenAI) -> None:
    """A response format of a JSON schema is obeyed, even by a small model."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


def test_a_named_tool_is_called(client: OpenAI) -> None:
    """A tool that the client names comes back as a call with arguments of its schema."""
    tool: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=60,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert [call.type for call in calls] == ["function"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")  # type: ignore[union-attr]


def test_responses_and_messages(cluster: Cluster, client: OpenAI) -> None:
    """OpenAI's responses and Anthropic's messages answer too."""
    answer = client.responses.create(model="smollm2", input="Say hi.", max_output_tokens=8)
    assert answer.output_text
    reply = httpx.post(
        f"{cluster.url}/v1/messages",
        json={"model": "smollm2", "max_tokens": 12, "messages": ASK, "temperature": 0},
        timeout=60,
    ).json()
    assert reply["content"][0]["text"] == "The capital of France is Paris."


def test_models_and_tokenize(cluster: Cluster, client: OpenAI) -> None:
    """The served names are listed and answer alike; text becomes tokens and back."""
    assert [model.id for model in client.models.list()] == ["smollm2", "another-name"]
    answer = client.completions.create(model="another-name", prompt="a", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    made = httpx.post(
        f"{cluster.url}/tokenize", json={"model": "smollm2", "prompt": "hello world"}
    ).json()
    text = httpx.post(
        f"{cluster.url}/detokenize", json={"model": "smollm2", "tokens": made["tokens"]}
    ).json()
    assert text["prompt"] == "hello world"


def test_service_tier_and_request_id_reach_the_pipeline(cluster: Cluster, client: OpenAI) -> None:
    """`flex` makes a request batch; the caller's request id comes back and names the record."""
    raw = client.chat.completions.with_raw_response.create(
        model="smollm2",
        messages=ASK,
        max_tokens=2,
        service_tier="flex",
        prompt_cache_key="conversation-1",
        safety_identifier="user-1",
        extra_headers={"x-request-id": "my-own-id"},
    )
    assert raw.headers["x-request-id"] == "my-own-id"
    samples = cluster.metrics()
    assert any('class="batch"' in name and value for name, value in samples.items())
    assert samples['breakeven_batch_wait_seconds_count{reason="room"}'] >= 1
    assert samples["breakeven_batch_waiting"] == 0


@pytest.mark.parametrize(
    ("asked", "used"), [("flex", "flex"), ("auto", "default"), ("priority", "default")]
)
def test_answers_say_which_tier_was_used(client: OpenAI, asked: Any, used: str) -> None:
    """In each API whose answers have the field; a batch answer is the same as any."""
    chat = client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=12, temperature=0, service_tier=asked
    )
    assert chat.choices[0].message.content == "The capital of France is Paris."
    text = client.completions.create(
        model="smollm2", prompt="a", max_tokens=1, extra_body={"service_tier": asked}
    )
    answer = client.responses.create(
        model="smollm2", input="Say hi.", max_output_tokens=4, service_tier=asked
    )
    tiers = (chat.service_tier, text.model_dump()["service_tier"], answer.service_tier)
    assert tiers == (used, used, used)


BAD: list[tuple[str, str, Any, int, str]] = [
    ("malformed JSON", "/v1/chat/completions", b"{bad", 400, ""),
    ("JSON that is no object", "/v1/chat/completions", b"[1]", 400, ""),
    ("an empty body", "/v1/chat/completions", b"", 400, ""),
    ("invalid UTF-8", "/v1/completions", b'{"model":"smollm2","prompt":"\xff"}', 400, "UTF-8"),
    ("deep nesting", "/v1/completions", b"[" * 100_000, 400, ""),
    ("a wrong model", "/v1/completions", {"model": "nope", "prompt": "a"}, 404, "nope"),
    ("negative max_tokens", "/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "-1"),
    ("no prompt", "/v1/completions", {"prompt": []}, 400, ""),
    ("an empty prompt", "/v1/completions", {"prompt": ""}, 400, ""),
    ("an unknown token", "/v1/completions", {"prompt": [999_999_999]}, 400, "999999999"),
    ("a negative token", "/v1/completions", {"prompt": [-5]}, 400, ""),
    ("over the context", "/v1/completions", {"prompt": [5] * 8193, "max_tokens": 9}, 400, "8192"),
    ("NaN temperature", "/v1/completions", b'{"prompt":"a","temperature":NaN}', 400, ""),
    ("an endless number", "/v1/completions", {"prompt": "a", "top_k": 10**30}, 400, "64 bits"),
    ("a grammar in a list", "/v1/completions", {"prompt": "a", "structured_outputs": []}, 400, ""),
    ("a huge n", "/v1/completions", {"prompt": "a", "n": 10**9}, 400, ""),
    ("a tier that is none", "/v1/completions", {"prompt": "a", "service_tier": "x"}, 400, "flex"),
    ("tiers", "/v1/responses", {"input": "a", "service_tier": ["flex"]}, 400, "a JSON list"),
    (
        "a huge batch n",
        "/v1/completions",
        {"prompt": "a", "n": 999, "service_tier": "flex"},
        400,
        "",
    ),
    (
        "a broken schema",
        "/v1/completions",
        {"prompt": "a", "max_tokens": 4, "structured_outputs": {"json": {"type": "nonsense"}}},
        400,
        "",
    ),
    (
        "a broken regex",
        "/v1/completions",
        {"prompt": "a", "max_tokens": 4, "structured_outputs": {"regex": "(("}},
        400,
        "",
    ),
    (
        "an image",
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                    ],
                }
            ]
        },
        400,
        "",
    ),
    ("embeddings", "/v1/embeddings", {"input": "a"}, 404, "embeddings are not served"),
    ("LoRA loading", "/v1/load_lora_adapter", {"lora_name": "a"}, 404, "LoRA"),
    ("an unlisted route", "/inference/v1/generate", {"prompt": "a"}, 404, "no such route"),
    ("elastic scaling", "/scale_elastic_ep", {"new": 1}, 404, "no such route"),
    ("a body over 10 MB", "/v1/completions", b'"' + b"a" * 10_000_000 + b'"', 413, "10000000"),
]


@pytest.mark.parametrize(("what", "path", "body", "status", "says"), BAD, ids=[b[0] for b in BAD])
def test_bad_input_gets_an_openai_shaped_error(
    cluster: Cluster, what: str, path: str, body: Any, status: int, says: str
) -> None:
    """A wrong request is answered at once with a 4xx in OpenAI's shape, never a 500."""
    if isinstance(body, dict):
        body = json.dumps({"model": "smollm2", **body}).encode()
    elif b'"prompt"' in body and b'"model"' not in body:
        body = body.replace(b"{", b'{"model":"smollm2",', 1)
    answer = httpx.post(
        cluster.url + path,
        content=body,
        headers={"content-type": "application/json"},
        timeout=20,
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["code"] == status
    assert answer.headers["x-request-id"]


def test_a_request_timeout_ends_it_everywhere(cluster: Cluster) -> None:
    """x-request-timeout: a plain request gets 504, a stream an error in its body, both in time;
    the engines stop (the fixture waits for the books to balance)."""
    body = {"model": "smollm2", "prompt": [7, 8, 9], "max_tokens": 4000, "ignore_eos": True}
    for stream in (False, True):
        began = time.monotonic()
        answer = httpx.post(
            f"{cluster.url}/v1/completions",
            json={**body, "stream": stream},
            headers={"x-request-timeout": "0.7"},
            timeout=20,
        )
        assert time.monotonic() - began < 2.0
        assert "not done after 0.7 s" in answer.text
        assert answer.status_code == (200 if stream else 504)
    answer = httpx.post(
        f"{cluster.url}/v1/completions", json=body, headers={"x-request-timeout": "soon"}
    )
    assert answer.status_code == 400
    assert "soon" in answer.json()["error"]["message"]


def test_replicas_run_at_the_priority_of_their_command(cluster: Cluster) -> None:
    """Ray would have them stand behind everything else that the machine does."""
    pids = [row["pid"] for row in cluster.replicas().values()]
    pids.append(cluster.get("/admin/replicas")["catalogue"]["pid"])
    assert {psutil.Process(pid).nice() for pid in pids} == {psutil.Process().nice()}


def test_a_burst_is_answered_whole(cluster: Cluster) -> None:
    """40 requests at once, mixed with bad ones: every good one gets its tokens."""

    def ask(number: int) -> int:
        prompt = f"Count from {number}: " + "one two three four " * (number % 7 * 8)
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 4 if number % 5 else -1}
        return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120).status_code

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(ask, range(40)))
    assert statuses == [200 if number % 5 else 400 for number in range(40)]


def test_logs_hold_no_prompt(cluster: Cluster, client: OpenAI) -> None:
    """Neither a prompt nor an answer is in any log, even when the request was wrong; and our
    log lines are JSON."""
    secret = "xylophone-4711-quagmire"
    client.completions.create(model="smollm2", prompt=f"{secret} and so on", max_tokens=3)
    httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "smollm2", "prompt": {"wrong": secret}, "max_tokens": -3},
    )
    cluster.await_rest()
    logs = [path for path in cluster.run_dir().rglob("*") if path.is_file() and _is_log(path)]
    assert logs
    texts = {path: path.read_text(errors="replace") for path in logs}
    assert not [path for path, text in texts.items() if secret in text]
    lines = [
        line for text in texts.values() for line in text.splitlines() if '"request_id"' in line
    ]
    assert any(json.loads(line)["outcome"] in ("length", "stop") for line in lines)


def _is_log(path: Any) -> bool:
    return path.suffix in (".err", ".out", ".log")
