"""OpenAI's batch format: a file of requests, a file of answers, and which requests are left.

A request is a line `{"custom_id", "method": "POST", "url", "body"}`, an answer a line `{"id",
"custom_id", "response": {"status_code", "request_id", "body"}, "error": null}`. The file of answers
is all that is known of how far a batch has come: a line is added for each answer, and one that a
crash cut off is taken away again.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from cluster.errors import BatchFileError

# Where a batch may send its requests.
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_MOST_ID_CHARACTERS = 512


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a batch; `custom_id` is its name in both files."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"

    def complaint(self) -> str | None:
        """Why it cannot be sent."""
        if not 1 <= len(self.custom_id) <= _MOST_ID_CHARACTERS:
            return f"custom_id has {len(self.custom_id)} characters; give 1 to 512"
        if self.method != "POST":
            return f"method is {self.method[:20]!r}; POST is the only one"
        if self.url not in URLS:
            return f"url is {self.url[:80]!r}; give one of {', '.join(URLS)}"
        if self.body.get("stream"):
            return "its body asks for a stream, which nobody would read; leave `stream` out"
        return None


class Response(msgspec.Struct, frozen=True):
    """What the cluster answered."""

    status_code: int
    request_id: str
    body: Any


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the file of answers. `error` is always null: what got no answer has no line."""

    id: str
    custom_id: str
    response: Response
    error: None = None


def check(path: Path) -> dict[str, None]:
    """Read all requests; their names, in order. Raises `BatchFileError` for the first line that
    cannot be sent, before anything is."""
    names: dict[str, None] = {}
    for number, call in _numbered(path):
        if call.custom_id in names:
            raise BatchFileError(str(path), number, f"custom_id {call.custom_id!r} is given twice")
        names[call.custom_id] = None
    return names


def calls(path: Path) -> Iterator[Call]:
    """The requests, one after the other. Raises `BatchFileError`."""
    return (call for _, call in _numbered(path))


def _numbered(path: Path) -> Iterator[tuple[int, Call]]:
    decoder = msgspec.json.Decoder(Call)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _call(decoder, path, number, line)
    except OSError as error:
        raise BatchFileError(str(path), 0, error.strerror or str(error)) from error


def _call(decoder: "msgspec.json.Decoder[Call]", path: Path, number: int, line: bytes) -> Call:
    try:
        call = decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BatchFileError(str(path), number, str(error)) from error
    complaint = call.complaint()
    if complaint is not None:
        raise BatchFileError(str(path), number, complaint)
    return call


class Answers:
    """The file of answers, open to be added to; `known` has the status of each by its name."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.known: dict[str, int] = {}
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                answer = self._answer(number, line)
                self.known[answer.custom_id] = answer.response.status_code
            else:  # cut off by a crash
                file.truncate(file.tell() - len(line))

    def add(self, answer: Answer) -> None:
        """One more line, in the file once this returns; after a crash of the machine the last few
        may be missing. Raises `BatchFileError` where it cannot be written."""
        try:
            self._file.write(msgspec.json.encode(answer) + b"\n")
            self._file.flush()
        except OSError as error:
            raise BatchFileError(str(self._path), 0, error.strerror or str(error)) from error
        self.known[answer.custom_id] = answer.response.status_code

    def _answer(self, number: int, line: bytes) -> Answer:
        try:
            return msgspec.json.decode(line, type=Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            complaint = f"no answer of a batch: {error}; give a new file for the answers"
            raise BatchFileError(str(self._path), number, complaint) from error


@contextmanager
def answers(path: Path) -> Iterator[Answers]:
    """The file of answers, made if it is not there; nobody else may write to it until the block
    ends. Raises `BatchFileError`."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise BatchFileError(str(path), 0, error.strerror or str(error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BatchFileError(str(path), 0, "another process writes to it") from error
        yield Answers(path, file)
        os.fsync(file.fileno())


def counted(known: Mapping[str, int]) -> tuple[int, int]:
    """How many were answered well, and how many were refused."""
    well = sum(status == 200 for status in known.values())
    return well, len(known) - well
