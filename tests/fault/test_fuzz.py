"""Two thousand requests, half of them in order, half of them not."""

import concurrent.futures
import contextlib
import re
import socket
import time
from collections import Counter

from tests.fault.faults import ask_long, ask_short
from tests.fault.fuzz import Case, case
from tests.flow.cluster_process import Cluster

REQUESTS, AT_ONCE = 2000, 8
# Each is an answer of a few tokens, among eight.
ANSWERED_S = 30.0
# Junk can be a valid wish for thousands of tokens (n, no length, an endless grammar).
ENDED_S = b"15"
# The final one: `expect` is answered by a 100 before it.
_STATUS = re.compile(rb"HTTP/1\.1 ([2-5]\d\d)")
# An error that comes after a stream has begun.
_IN_STREAM = re.compile(rb'"code": ?(5\d\d)|"type": ?"InternalServerError"')


def _send(url: str, made: Case) -> tuple[int, str]:
    """(status, what is wrong); the status is 0 where the client left before it came."""
    port = int(url.rsplit(":", 1)[1])
    began = time.monotonic()
    headers = made.headers
    if b"x-request-timeout" not in dict(headers):
        headers = (*headers, (b"x-request-timeout", ENDED_S))
    raw = Case(made.path, made.method, made.content, headers).raw()
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWERED_S) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(raw)
        if made.leaves_after_s is not None:
            time.sleep(made.leaves_after_s)
            return 0, ""
        answer = _read(connection, began)
    if answer is None:
        return 0, f"no end after {ANSWERED_S} s"
    found = _STATUS.search(answer)
    status = int(found[1]) if found else 0
    if status == 504 or b'"code":504' in answer or b'"code": 504' in answer:
        return status, "" if not made.valid else "a valid request took too long"
    wrong = status == 0 or status >= 500 or (made.valid and status != 200)
    wrong = wrong or _IN_STREAM.search(answer) is not None
    return status, answer[:300].decode(errors="replace") if wrong else ""


def _read(connection: socket.socket, began: float) -> bytes | None:
    chunks = []
    with contextlib.suppress(ConnectionResetError):
        while True:
            left_s = began + ANSWERED_S - time.monotonic()
            if left_s <= 0:
                return None
            connection.settimeout(left_s)
            try:
                chunk = connection.recv(65536)
            except TimeoutError:
                return None
            if not chunk:
                break
            chunks.append(chunk)
    return b"".join(chunks)


def test_no_request_is_answered_5xx_or_not_at_all(
    pools: Cluster, truth: dict[str, list[int]]
) -> None:
    """Whatever comes: wrong types, huge numbers, NaN, lone surrogates, deep nesting, cut bodies,
    odd methods and headers, clients that leave. Each request is answered in time and never by a
    5xx (but the 504 of its own time limit); those in order by a 200. Afterwards the cluster gives
    right tokens and holds nothing."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        cases = [case(seed) for seed in range(REQUESTS)]
        outcomes = list(pool.map(lambda made: _send(pools.url, made), cases))
    wrong = [
        f"seed {seed} {cases[seed].method} {cases[seed].path} {cases[seed].what}: {status} {said}"
        for seed, (status, said) in enumerate(outcomes)
        if said
    ]
    counts = Counter(status for status, _ in outcomes)
    assert not wrong, f"{len(wrong)} of {dict(counts)}:\n" + "\n".join(wrong)
    assert counts[200] > REQUESTS * 0.4
    assert sum(counts[status] for status in range(400, 500)) > REQUESTS * 0.2
    assert counts[504] < REQUESTS * 0.02
    assert ask_long(pools, "fuzzed").done().tokens == truth["long"]
    assert ask_short(pools, "fuzzed").done().tokens == truth["short"]
