"""Structured logs of a replica or an ingress: one JSON object a line, no prompt in any.

vLLM's own lines come through the same handler (VLLM_CONFIGURE_LOGGING=0), at WARNING and above;
request and response logging stay off there.
"""

import json
import logging
import sys
import time
from typing import Any

_OURS = ("kv", "workers", "router", "cluster")


class JsonLines(logging.Formatter):
    """A record as JSON; `extra={"fields": {...}}` adds fields of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def fatal(why: str) -> None:
    """Say why this process cannot start; `serve` shows it to whoever started the cluster."""
    logging.getLogger(__name__).error("cannot start", extra={"fields": {"fatal": why}})


def read_fatal(log: str) -> str | None:
    """The first reason that a log of a process gives for not starting."""
    for line in log.splitlines():
        if '"fatal"' in line:
            try:
                return str(json.loads(line)["fatal"])
            except (ValueError, KeyError):
                continue
    return None


def configure(process: str) -> None:
    """Send this process's records to stderr, ours from INFO, everybody else's from WARNING.

    To the process's own stderr: Serve replaces `sys.stderr` by a logger that puts words of its
    own before each line.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines(process))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
