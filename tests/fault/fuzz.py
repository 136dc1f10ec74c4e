"""Requests that no client should send, made from a seed; every second one is in order."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Body = dict[str, Any]
GENERATES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_MESSAGES = [{"role": "user", "content": "How many lamps are lit?"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# Answers of three tokens: thousands of requests must not take minutes.
VALID: dict[str, Body] = {
    "/v1/completions": {"prompt": "The harbour", "max_tokens": 3},
    "/v1/chat/completions": {"messages": _MESSAGES, "max_tokens": 3},
    "/v1/responses": {"input": "The harbour", "max_output_tokens": 3, "store": False},
    "/v1/messages": {"messages": _MESSAGES, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    "/tokenize": {"prompt": "The harbour"},
    "/detokenize": {"tokens": [100, 200]},
}
BARE = ("/v1/models", "/version", "/healthz", "/readyz", "/metrics", "/admin/replicas")
ODD_PATHS = ("/", "/v1", "//v1/models", "/v1/completions/", "/v1/../admin", "/%00", "/v1/%ff", "/x")
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO")

_LONE, _DEEP = "\ud800", json.loads("[" * 60 + "]" * 60)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "a", "\x00", _LONE, f"a{_LONE}b"),
    *("\U0001f600" * 40, "a" * 20_000, "١٢٣", "\u202e", [], [[]], [None], [1], [-1], [2**40]),
    *(["a"], ["a"] * 300, {}, {"a": 1}, {"": None}, {"type": "x"}, [{}], [{"role": "user"}], _DEEP),
)
FIELDS = (
    *("n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "suffix", "seed"),
    *("stop", "logit_bias", "tools", "tool_choice", "response_format", "structured_outputs"),
    *("min_tokens", "stream", "stream_options", "truncate_prompt_tokens", "add_special_tokens"),
    *("bad_words", "allowed_token_ids", "stop_token_ids", "min_p", "top_k", "top_p", "temperature"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "user", "metadata", "system"),
    *("documents", "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "cache_salt"),
    *("service_tier", "kv_transfer_params", "vllm_xargs", "priority", "request_id", "model"),
    *("return_tokens_as_token_ids", "return_token_ids", "include_reasoning", "reasoning_effort"),
    *("add_generation_prompt", "continue_final_message", "prompt", "messages", "input", "tokens"),
    *("use_beam_search", "length_penalty", "skip_special_tokens", "spaces_between_special_tokens"),
    *("ignore_eos", "include_stop_str_in_output", "prompt_embeds", "parallel_tool_calls", "text"),
    *("previous_response_id", "background", "include", "instructions", "reasoning", "truncation"),
    *(
        "thinking",
        "stop_sequences",
        "functions",
        "prompt_cache_key",
        "safety_identifier",
        "modalities",
    ),
)
# Fields that say how long an answer may get: junk there is a valid wish for thousands of tokens.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_BAD_LENGTHS: tuple[Any, ...] = (-1, 0, "x", 10**30, float("nan"), [], {}, True, 2**63, -0.5)
HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/plain"),
    (b"content-type", b"multipart/form-data; boundary=x"),
    (b"content-type", b"application/json; charset=utf-16"),
    (b"content-encoding", b"gzip"),
    (b"x-request-id", b"\xff\xfe"),
    (b"x-request-id", b"a" * 5000),
    (b"x-request-timeout", b"-1"),
    (b"x-request-timeout", b"nan"),
    (b"x-request-timeout", b"1e999"),
    (b"authorization", b"Bearer \xff"),
    (b"authorization", b"Basic"),
    (b"x-data-parallel-rank", b"7"),
    (b"accept", b"image/png"),
    (b"host", b""),
    (b"cookie", b"a=" + b"b" * 4000),
    (b"range", b"bytes=5-1"),
    (b"expect", b"100-continue"),
    (b"te", b"trailers"),
    (b"x-forwarded-for", b"'; DROP"),
)


@dataclass(frozen=True)
class Case:
    """One request as bytes; `leaves_after_s` is when its client goes, if it does."""

    path: str
    method: str = "POST"
    content: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    valid: bool = False
    leaves_after_s: float | None = None
    what: tuple[str, ...] = field(default=())

    def raw(self) -> bytes:
        """What goes over the socket."""
        given = {name for name, _ in self.headers}
        lines = [f"{self.method} {self.path} HTTP/1.1".encode()]
        own = ((b"host", b"localhost"), (b"content-type", b"application/json"))
        own += ((b"content-length", str(len(self.content)).encode()), (b"connection", b"close"))
        kept = [pair for pair in own if pair[0] not in given]
        lines += [name + b": " + value for name, value in (*kept, *self.headers)]
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.content


def case(seed: int) -> Case:
    """The request of a seed."""
    rng = random.Random(seed)
    made = _valid(rng) if seed % 2 == 0 else rng.choice(_MUTATIONS)(rng)
    if rng.random() < 0.08:
        made = replace(made, leaves_after_s=rng.choice((0.0, 0.003, 0.02, 0.1, 0.3)))
    return made


def _valid(rng: random.Random) -> Case:
    if rng.random() < 0.1:
        return Case(rng.choice(BARE), "GET", valid=True)
    path = rng.choice((*GENERATES, *VALID))
    body = {"model": "smollm2", **VALID[path]}
    if path in GENERATES and rng.random() < 0.5:
        body["stream"] = True
    if path == "/v1/completions":
        body["prompt"] = [rng.randrange(3, 40_000) for _ in range(rng.randrange(1, 90))]
    return Case(path, content=_dump(body), valid=True)


def _fields(rng: random.Random) -> Case:
    """A body with junk in known fields."""
    path = rng.choice((*GENERATES, *VALID))
    body: Body = {"model": "smollm2", **VALID[path]}
    names = rng.sample(FIELDS, rng.choice((1, 1, 1, 2, 4)))
    for name in names:
        body[name] = rng.choice(JUNK)
    return Case(path, content=_dump(body), what=tuple(names))


def _lengths(rng: random.Random) -> Case:
    path = rng.choice(GENERATES)
    body = {"model": "smollm2", **VALID[path]}
    name = next(name for name in _LENGTHS if name in body)
    body[name] = rng.choice(_BAD_LENGTHS)
    return Case(path, content=_dump(body), what=(name,))


def _nested(rng: random.Random) -> Case:
    """Junk somewhere inside: in a message, a tool, a schema, a list of options."""
    path = "/v1/chat/completions"
    body: Body = json.loads(_dump({"model": "smollm2", **VALID[path]}))
    junk = rng.choice(JUNK)
    places: dict[str, Callable[[], None]] = {
        "role": lambda: body["messages"][0].update(role=junk),
        "content": lambda: body["messages"][0].update(content=junk),
        "part": lambda: body["messages"][0].update(content=[{"type": "text", "text": junk}]),
        "part type": lambda: body["messages"][0].update(content=[{"type": junk, "text": "a"}]),
        "tool": lambda: body.update(tools=[{**_TOOL, "function": junk}]),
        "tool parameters": lambda: body.update(
            tools=[{**_TOOL, "function": {"name": "f", "parameters": junk}}]
        ),
        "tool name": lambda: body.update(
            tools=[_TOOL], tool_choice={"type": "function", "function": {"name": junk}}
        ),
        "tool calls": lambda: body["messages"].append({"role": "assistant", "tool_calls": junk}),
        "schema": lambda: body.update(
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": junk}}
        ),
        "regex": lambda: body.update(structured_outputs={"regex": junk}),
        "choice": lambda: body.update(structured_outputs={"choice": junk}),
        "grammar": lambda: body.update(structured_outputs={"grammar": junk}),
        "tag": lambda: body.update(structured_outputs={"structural_tag": junk}),
        "usage": lambda: body.update(stream=True, stream_options={"include_usage": junk}),
        "bias": lambda: body.update(logit_bias={"5": junk}),
        "template": lambda: body.update(chat_template_kwargs={"tools": junk, "messages": junk}),
    }
    place = rng.choice(sorted(places))
    places[place]()
    return Case(path, content=_dump(body), what=(place,))


def _bytes(rng: random.Random) -> Case:
    """A body that is cut off, garbled, or no JSON at all."""
    path = rng.choice(list(VALID))
    content = bytearray(_dump({"model": "smollm2", **VALID[path]}))
    kind = rng.choice(("cut", "flip", "noise", "deep", "bom", "twice", "empty"))
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "flip":
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = content.replace(b'"max_', b'"min_')
        content = content.replace(b"{", b'{"max_tokens":2,', 1)
    elif kind == "noise":
        content = bytearray(rng.randbytes(rng.randrange(400)))
    elif kind == "deep":
        content = bytearray(b'{"a":' * 30_000)
    elif kind == "bom":
        content = b"\xef\xbb\xbf" + content
    elif kind == "twice":
        content = content + content
    else:
        content = bytearray()
    return Case(path, content=bytes(content), what=(kind,))


def _route(rng: random.Random) -> Case:
    path = rng.choice((*VALID, *BARE, *ODD_PATHS))
    return Case(path, rng.choice(METHODS), b"{}", what=("route",))


def _headers(rng: random.Random) -> Case:
    made = _valid(rng)
    return replace(made, valid=False, headers=tuple(rng.sample(HEADERS, rng.choice((1, 1, 2)))))


def _framing(rng: random.Random) -> Case:
    """A length that is not the body's; its client leaves, since nothing may answer."""
    made = _valid(rng)
    lengths = (b"-1", b"x", str(len(made.content) + 50).encode(), b"3", b"99999999999", b"1, 2")
    headers = ((b"content-length", rng.choice(lengths)),)
    return replace(made, valid=False, headers=headers, leaves_after_s=0.2)


_MUTATIONS = (
    _fields,
    _fields,
    _fields,
    _nested,
    _nested,
    _lengths,
    _bytes,
    _route,
    _headers,
    _framing,
)


def _dump(body: Body) -> bytes:
    return json.dumps(body).encode()  # NaN and lone surrogates go out as they are
