"""One streamed answer, read on a thread of its own."""

import contextlib
import http.client
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0


class Stream(threading.Thread):
    """Posts `body` at once; `tokens`, `text` and `finish` grow while it runs."""

    def __init__(self, url: str, path: str, body: dict[str, Any], name: str = "") -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.text = ""
        self.error: str | None = None
        self.finish: str | None = None
        self.status = 0
        self.plan = ""
        self.name_asked = name
        self._where = f"{path} {name}"
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        self._connection.connect()
        self.port: int = self._connection.sock.getsockname()[1]
        headers = {"content-type": "application/json"}
        headers |= {"x-request-id": name} if name else {}
        asked = {**body, "stream": True, "return_token_ids": True}
        self._connection.request("POST", path, json.dumps(asked), headers)
        self.start()

    def run(self) -> None:
        try:
            answer = self._connection.getresponse()
            self.status = answer.status
            self.plan = answer.headers.get("x-breakeven-plan", "")
            done = self.status != 200
            for line in iter(answer.readline, b""):
                done = done or line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
            # A connection that is lost in mid-answer looks to http.client like the end of it.
            self.error = self.error or (None if done else "cut off")
        # The thread's edge: tests look. A line that is cut off is no JSON.
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            self.error = repr(error)
        finally:
            self._connection.close()

    def done(self, timeout_s: float = TIMEOUT_S) -> "Stream":
        """This stream, ended; raises AssertionError if it hangs or failed."""
        self.join(timeout_s)
        assert not self.is_alive(), f"{self._where}: no end after {timeout_s} s"
        assert self.error is None, f"{self._where}: {self.error}"
        assert self.status == 200, f"{self._where}: {self.status}"
        return self

    def leave(self) -> None:
        """Close the connection, whatever has come."""
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    @property
    def answer(self) -> tuple[list[int], str, str | None]:
        """All that a client sees of it."""
        return self.tokens, self.text, self.finish

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        for choice in chunk["choices"]:
            self.tokens += choice.get("token_ids") or []
            self.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self.finish = choice["finish_reason"] or self.finish
