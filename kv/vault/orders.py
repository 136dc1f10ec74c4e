"""What a ledger is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from kv.errors import VaultError


@dataclass(frozen=True, slots=True)
class Quotas:
    """Bytes that a shard holds at most: in all, for the tenants named, and for each other one
    (None: as many as there are). Raises VaultError for a quota below 1 byte.
    """

    total_bytes: int
    tenant_bytes: Mapping[str, int] = field(default_factory=dict)
    other_tenant_bytes: int | None = None

    def __post_init__(self) -> None:
        each = [self.total_bytes, *self.tenant_bytes.values()]
        if self.other_tenant_bytes is not None:
            each.append(self.other_tenant_bytes)
        if min(each) < 1:
            raise VaultError("vault quotas", f"{min(each)} bytes at least", "give 1 or more each")

    def of(self, tenant: str) -> int:
        """Bytes of one tenant at most."""
        own = self.tenant_bytes.get(tenant, self.other_tenant_bytes)
        return self.total_bytes if own is None else min(own, self.total_bytes)


@dataclass(frozen=True, slots=True)
class Put:
    """One encoded block that `writer` wants to store until `ttl_s` from now.

    `parent` is the key of the block before it; `seconds_saved` what computing the block would take
    (`kv.eviction.recompute_s`). Raises VaultError for an empty block, a cost that is not finite or
    below 0, a life of no time, or a block that is its own parent.
    """

    key: bytes
    parent: bytes | None
    tenant: str
    writer: str
    n_bytes: int
    seconds_saved: float
    ttl_s: float = inf

    def __post_init__(self) -> None:
        costs = self.n_bytes >= 1 and 0.0 <= self.seconds_saved < inf
        if not (costs and self.ttl_s > 0.0) or self.parent == self.key:
            raise VaultError(
                f"put of {self.key.hex()}",
                f"{self.n_bytes} bytes, saves {self.seconds_saved} s, kept {self.ttl_s} s, "
                f"behind {self.parent.hex() if self.parent else 'none'}",
                "give a size and a time to live above 0, a finite cost, and another block's key",
            )


class Outcome(StrEnum):
    """What becomes of a put."""

    WRITE = "write"  # room is reserved: send the bytes, then complete or abort
    STORED = "stored"  # it is here already; its time to live was renewed
    BUSY = "busy"  # another writer sends it now, or its old bytes are still being read
    REFUSED = "refused"


class Refusal(StrEnum):
    """Why a put was refused."""

    LARGER_THAN_QUOTA = "larger_than_quota"  # of the tenant, or in all
    TENANT_HELD = "tenant_held"  # what the tenant has is pinned, leased, written or needed by that
    ALL_HELD = "all_held"  # the same of all that is stored
    WORTH_LESS = "worth_less"  # than each block that could go for it


class Cause(StrEnum):
    """Why a block is gone."""

    QUOTA = "quota"  # evicted for another of a tenant that is at its quota
    SPACE = "space"  # evicted for another since the shard is full
    EXPIRED = "expired"  # its time to live ended
    WRITE_ENDED = "write_ended"  # its writer gave up, or was not done in time
    DROPPED = "dropped"  # its bytes were found wrong or lost
    FORGOTTEN = "forgotten"  # its tenant was


@dataclass(frozen=True, slots=True)
class Removed:
    """A block whose bytes nobody reads any more: they can be freed."""

    key: bytes
    n_bytes: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a put, and what is gone: for it, or since the last order."""

    outcome: Outcome
    refusal: Refusal | None = None
    detail: str = ""
    removed: tuple[Removed, ...] = ()


@dataclass(frozen=True, slots=True)
class Lent:
    """How many of the leading blocks were lent or pinned, and what is gone since the last order."""

    depth: int
    removed: tuple[Removed, ...] = ()
