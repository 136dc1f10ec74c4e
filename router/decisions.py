"""`/admin/decisions`: the last requests, what was planned for each and what came of it."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from router.audit import Record
from router.entry import Scribe
from router.intake import REQUEST_ID
from router.report import decision_row

_MOST = 1000
# Rows of 40 us each, between which requests go on.
_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Filter:
    """Which decisions are asked for: those of a request id, and the last `limit` of them."""

    request_id: str | None = None
    limit: int = _MOST

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]]) -> "Filter":
        """What a query string asks for. Raises ValueError for anything that is not understood."""
        given = dict(query)
        unknown = sorted(set(given) - {"request_id", "limit"})
        if unknown:
            raise ValueError(f"{unknown[0][:40]!r} is no filter; give request_id or limit")
        if len(given) < len(query):
            raise ValueError("a filter is given twice")
        request_id = given.get("request_id")
        if request_id is not None and not REQUEST_ID.fullmatch(request_id):
            raise ValueError(f"request_id is {request_id[:40]!r}; give 1 to 128 visible characters")
        return cls(request_id, _limit(given.get("limit")))

    def of_records(self, records: Iterable[Record]) -> list[Record]:
        """Those of `records` that are asked for, in their order."""
        wanted = [each for each in records if self.request_id in (None, each.request_id)]
        return wanted[-self.limit :]


class Decisions:
    """Answers from an audit's records, with what `scribe` writes down of each."""

    def __init__(self, records: Iterable[Record], scribe: Scribe) -> None:
        self._records, self._scribe = records, scribe

    async def answer(self, request: Request) -> Response:
        """The decisions that the request's query asks for, the newest last."""
        try:
            asked = Filter.of(request.query_params.multi_items())
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)
        rows = []
        for record in asked.of_records(self._records):
            rows.append(self._row(record))
            if len(rows) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return Response(msgspec.json.encode({"decisions": rows}), media_type="application/json")

    def _row(self, record: Record) -> dict[str, Any]:
        return {**decision_row(record), "audit": self._scribe.entry(record)}


def _limit(text: str | None) -> int:
    if text is None:
        return _MOST
    limit = int(text) if text.isascii() and text.isdigit() and len(text) <= 4 else 0
    if not 1 <= limit <= _MOST:
        raise ValueError(f"limit is {text[:40]!r}; give a whole number from 1 to {_MOST}")
    return limit
