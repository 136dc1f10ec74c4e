"""A recount of a ledger's books, from its entries alone."""

from collections import Counter
from typing import TYPE_CHECKING

from kv.errors import VaultError

if TYPE_CHECKING:
    from kv.vault.ledger import Ledger


def check(ledger: "Ledger") -> None:
    """Raises VaultError for the first book that does not agree with the entries."""
    _check_bytes(ledger)
    _check_tree(ledger)
    _check_holders(ledger)
    _check_ends(ledger)


def _expect(book: str, kept: object, counted: object) -> None:
    if kept != counted:
        raise VaultError(f"vault ledger, {book}", f"{kept} kept, {counted} counted", "report it")


def _check_bytes(ledger: "Ledger") -> None:
    named = list(ledger._entries.values())
    leaving = [entry for entry, _ in ledger._leaving.values()]
    by_tenant: Counter[str] = Counter()
    for entry in (*named, *leaving):
        by_tenant[entry.tenant] += entry.n_bytes
    _expect("bytes by tenant", dict(ledger._bytes), dict(by_tenant))
    _expect("bytes", ledger._total_bytes, by_tenant.total())
    _expect("names of what is leaving", [e for e in leaving if e.key in ledger._entries], [])
    quotas = ledger._quotas
    over = [t for t, n_bytes in by_tenant.items() if n_bytes > quotas.of(t)]
    _expect("tenants over quota", over, [])
    _expect("bytes over quota", max(0, by_tenant.total() - quotas.total_bytes), 0)
    tenants: dict[str, set[bytes]] = {}
    for entry in named:
        tenants.setdefault(entry.tenant, set()).add(entry.key)
    _expect("keys by tenant", ledger._keys, tenants)


def _check_tree(ledger: "Ledger") -> None:
    named = ledger._entries
    children = Counter(entry.parent for entry in named.values() if entry.parent is not None)
    _expect("children", dict(ledger._children), dict(children))
    free = {key for key, entry in named.items() if not entry.held and not children[key]}
    _expect("leaves", set(ledger._leaves._ranks), free)
    of_tenants = {key for leaves in ledger._tenant_leaves.values() for key in leaves._ranks}
    _expect("leaves of tenants", of_tenants, free)
    for leaves in (ledger._leaves, *ledger._tenant_leaves.values()):
        ordered = {item[2] for item in leaves._order if leaves._valid(item)}
        _expect("ordered leaves", ordered, set(leaves._ranks))


def _check_holders(ledger: "Ledger") -> None:
    everywhere = [*ledger._entries.values(), *(entry for entry, _ in ledger._leaving.values())]
    leased: dict[str, set[bytes]] = {}
    pinned: dict[str, set[bytes]] = {}
    for entry in everywhere:
        for owner in entry.leases:
            leased.setdefault(owner, set()).add(entry.key)
        for owner in entry.pins:
            pinned.setdefault(owner, set()).add(entry.key)
    _expect("leases", ledger._leased, leased)
    _expect("pins", ledger._pinned, pinned)
    unread = [entry.key for entry, _ in ledger._leaving.values() if not entry.leases]
    _expect("leaving that nobody reads", unread, [])


def _check_ends(ledger: "Ledger") -> None:
    """Nothing is past its end, and every end to come is watched."""
    watched = set(ledger._ends)
    for entry in (*ledger._entries.values(), *(entry for entry, _ in ledger._leaving.values())):
        ends = [*entry.leases.values()]
        if entry.key in ledger._entries:
            ends += [entry.writer_end_s] if entry.writer is not None else []
            ends += [entry.expires_s] if not entry.pins else []
        for end_s in ends:
            _expect("ends that passed", end_s <= ledger._now_s, False)
            _expect("ends watched", (end_s, entry.key) in watched or end_s == float("inf"), True)
