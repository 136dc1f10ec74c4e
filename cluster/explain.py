"""`breakeven explain`: what was planned for one request, why, and what came of it."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import msgspec

from cluster import state
from cluster.config import audit_dir
from cluster.errors import AdminKeyError, AuditFileError, NotRunningError, UnknownRequestError
from cluster.status import address, fetch
from cluster.timeline import ASCII, Marks, lines
from kv.audit import BadLine, Entry, read
from router.rotation import lines_of, newest_first

# Requests of one id that are printed: a client may give all of its requests the same.
_SHOWN = 3


def explain(request_id: str, place: Path | None, as_json: bool) -> int:
    """Print the requests of this id: what the running cluster knows of them, else what lies in the
    audit's files; with `place`, only what lies in that file or folder.

    Raises `UnknownRequestError`, `AuditFileError`, or `AdminKeyError` where only the cluster might
    know it.
    """
    entries = _of_cluster(request_id) if place is None else _of_files(request_id, place)
    if as_json:
        print(msgspec.json.encode({"request_id": request_id, "entries": entries}).decode())
        return 0
    marks = _marks()
    shown = ["\n".join(lines(entry, marks)) for entry in entries[-_SHOWN:]]
    print("\n\n".join(shown))
    if len(entries) > _SHOWN:
        print(f"\n{len(entries) - _SHOWN} earlier requests had this id; --json gives all of them")
    return 0


def _of_cluster(request_id: str) -> list[Entry]:
    """From the cluster's memory, or from where a cluster of this machine writes its audit."""
    url, folder = address(), _folder()
    known: list[Entry] = []
    refused: AdminKeyError | None = None
    asked = f"the cluster at {url} knows its last 1,000"
    try:
        known = _told(request_id, url)
    except NotRunningError as error:
        asked = f"no cluster answers at {error.address}"
    except AdminKeyError as error:
        refused = error
    known = known or _search(request_id, folder, missing_ok=True)
    if known:
        return known
    if refused is not None:
        raise refused
    raise UnknownRequestError(request_id, f"{asked}, and {folder} has none of it")


def _folder() -> Path:
    """Where the cluster of this machine writes its audit, or would by default."""
    found = state.read()
    return audit_dir() if found is None or found.audit is None else Path(found.audit)


def _told(request_id: str, url: str) -> list[Entry]:
    query = urlencode({"request_id": request_id})
    rows = fetch(url, f"/admin/decisions?{query}")["decisions"]
    audited = (json.dumps(row["audit"]).encode() for row in rows if "audit" in row)
    return list(read(audited, _warn(url)))


def _of_files(request_id: str, place: Path) -> list[Entry]:
    found = _search(request_id, place)
    if not found:
        raise UnknownRequestError(request_id, f"{place} has none of it")
    return found


def _search(request_id: str, place: Path, missing_ok: bool = False) -> list[Entry]:
    """The entries of an id in files, the oldest first; each line that might be one is read, and no
    other."""
    wanted, found = msgspec.json.encode(request_id), []
    try:
        for path in newest_first(place):
            entries = read(_with(wanted, lines_of(path)), _warn(str(path)))
            found += [entry for entry in entries if entry.request_id == request_id]
    except OSError as error:
        if not (missing_ok and isinstance(error, FileNotFoundError)):
            raise AuditFileError(str(error.filename or place), str(error.strerror)) from error
    return sorted(found, key=lambda entry: entry.at_s)


def _with(wanted: bytes, found: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that hold these bytes, and an empty one for each other: line numbers stay."""
    return (line if wanted in line else b"" for line in found)


def _warn(source: str) -> Callable[[BadLine], None]:
    """Says on stderr what is wrong with a line of this source."""

    def tell(bad: BadLine) -> None:
        print(f"{source}, line {bad.number}: {bad.complaint!r}; left out", file=sys.stderr)

    return tell


def _marks() -> Marks:
    """Blocks where the terminal's encoding has them."""
    marks = Marks()
    try:
        (marks.predicted + marks.actual).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return marks
