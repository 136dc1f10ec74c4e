"""Log lines are JSON objects, and the reason of a failed start is found again."""

import json
import logging
import sys

from workers.logs import JsonLines, read_fatal


def _record(message: str, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("workers.x", logging.INFO, "f", 1, message, (), None)
    record.__dict__.update(extra)
    return record


def test_a_line_is_one_json_object() -> None:
    """Whatever the message holds, a record is one line of JSON with its fields."""
    line = JsonLines("decode-0").format(_record('a "quote"\nand a break', fields={"n": 3}))
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == 'a "quote"\nand a break'
    assert (parsed["process"], parsed["n"]) == ("decode-0", 3)


def test_an_exception_is_part_of_its_line() -> None:
    """A traceback does not break the line."""
    try:
        raise ValueError("no")
    except ValueError:
        record = _record("failed")
        record.exc_info = sys.exc_info()
    line = JsonLines("p").format(record)
    assert "ValueError: no" in json.loads(line)["exception"]


def test_the_first_fatal_reason_is_read_back() -> None:
    """Among other lines, torn ones included, the first reason is the one."""
    fatal = JsonLines("p").format(_record("cannot start", fields={"fatal": "no such model"}))
    assert read_fatal(f'plain text\n{{"fatal": torn\n{fatal}\nmore') == "no such model"
    assert read_fatal("nothing here") is None
