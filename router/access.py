"""Who may ask, and how much: API keys from a file, each with its tenant, and tenants' limits.

The file holds SHA-256 digests only. Keys are random and long (`breakeven key` makes them), so a
digest needs no salt and no slow hash. The file is read again when it changes.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from router.context import CLASS_OF_TIER, ServiceClass
from router.errors import AccessError, KeyFileError
from router.limits import AtLeastOne, Limits

logger = logging.getLogger(__name__)

_HEX_DIGITS = 64
_LOOK_AGAIN_S = 1.0


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key of one tenant."""

    sha256: str
    tenant: str


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is set for one tenant: its `Limits`, and OpenAI's service tier of its requests that name
    none."""

    max_requests: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    service_tier: Literal["default", "flex"] = "default"

    @property
    def limits(self) -> Limits | None:
        """None for any amount."""
        limits = Limits(max_requests=self.max_requests, tokens_per_minute=self.tokens_per_minute)
        return None if limits == Limits() else limits


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's content; `admin` keys open /admin and nothing else."""

    keys: tuple[Key, ...] = ()
    admin: tuple[str, ...] = ()
    tenants: dict[str, Tenant] = {}


def digest(key: str) -> str:
    """What the file holds for `key`."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> KeyFile:
    """The file's content; raises `KeyFileError` with what is wrong."""
    try:
        content = msgspec.convert(yaml.safe_load(path.read_text()), KeyFile)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise KeyFileError(str(path), " ".join(str(error).split())) from error
    for each in (*(key.sha256 for key in content.keys), *content.admin):
        if len(each) != _HEX_DIGITS or not set(each) <= set("0123456789abcdef"):
            raise KeyFileError(str(path), f"{each[:8]}… is no SHA-256 in lower-case hex")
    # A name that is spelt differently in the two lists would leave its tenant without limits.
    for tenant in content.tenants.keys() - {key.tenant for key in content.keys}:
        raise KeyFileError(str(path), f"tenants.{tenant} is set, and no key is of that tenant")
    return content


_UNSET = Tenant()


class KeyRing:
    """The keys and limits in force. A file that becomes unusable leaves the last ones in force,
    which the log tells."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path, self._now = path, now
        self._looked_at, self._stamp = now(), self._stat()
        self._refused: tuple[int, int] | None = None
        self._take(read(path))

    def tenant(self, key: str | None) -> str:
        """The tenant of an API key; raises `AccessError` for none and for an unknown one."""
        self._look()
        tenant = self._tenants.get(digest(key)) if key else None
        if tenant is None:
            raise AccessError("API key", given=key is not None)
        return tenant

    def limits(self, tenant: str) -> Limits | None:
        """What `tenant` may ask for; None for any amount."""
        return self._tenants_set.get(tenant, _UNSET).limits

    def service_class(self, tenant: str) -> ServiceClass:
        """What requests of `tenant` are that do not say it."""
        return CLASS_OF_TIER[self._tenants_set.get(tenant, _UNSET).service_tier]

    def check_admin(self, key: str | None) -> None:
        """Raise `AccessError` unless `key` is an admin key."""
        self._look()
        if key is None or digest(key) not in self._admin:
            raise AccessError("admin key", given=key is not None)

    def _look(self) -> None:
        now = self._now()
        if now - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = now
        stamp = self._stat()
        if stamp != self._stamp:
            try:
                self._take(read(self._path))
            except KeyFileError as error:
                if stamp != self._refused:
                    logger.warning("the keys from before stay in force: %s", error)
                self._refused = stamp
                return  # half written, say: the next look tries again
            self._stamp = stamp

    def _take(self, content: KeyFile) -> None:
        self._tenants = {key.sha256: key.tenant for key in content.keys}
        self._admin = frozenset(content.admin)
        self._tenants_set = content.tenants

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0)
        return found.st_mtime_ns, found.st_ino
