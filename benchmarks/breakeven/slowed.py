"""How soon plans follow a link that becomes ten times slower, and one that recovers.

One prompt again and again, whose prefix lies in a vault behind the link: fetching it beats
computing it while the link is fast and loses while it is slow, which a request by either rule shows
first. A plan of ours is wrong when it does what loses then. What counts is the last wrong one
behind each change.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.breakeven.cells import COMPUTE, FETCH, OURS
from benchmarks.breakeven.far_vault import RAW, FarVault, Room, Way, far_vault
from benchmarks.result import Row, Store, at_most, shown
from kv.live import RETRY_S

_SUFFIX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Size:
    """Rates, the prompt, and how many requests follow each change."""

    fast_bits_per_s: float
    slow_bits_per_s: float
    prefix_tokens: int
    before: int
    slow: int
    after: int
    repeats: int
    room: Room


FULL = Size(1e9, 1e8, 1024, 6, 12, 40, 3, Room(1024))
QUICK = Size(1e9, 1e8, 512, 2, 4, 4, 1, Room(512, (RAW,), 1 << 27, 1 << 27))
PHASES = ("before", "slow", "after")


def measure(quick: bool) -> list[Row]:
    """Rows of this part; repeats that were measured at this commit are not measured again."""
    size, store = QUICK if quick else FULL, Store(__file__, quick)
    keys = [f"repeat-{number}" for number in range(size.repeats)]
    if any(key not in store for key in keys):
        with far_vault(Way("changing"), size.room, quick, RETRY_S) as vault:
            vault.store(RAW)
            for key in keys:
                store.get(key, partial(_repeat, vault, size))
    return rows([store.kept(key) for key in keys])


def rows(repeats: Sequence[dict[str, Any]]) -> list[Row]:
    """The worst of the repeats; and what either rule took, which says that there was something to
    follow."""
    slow = max(last_wrong(each, "slow") for each in repeats)
    after = max(last_wrong(each, "after") for each in repeats)
    detail = f"the last wrong plan of {len(repeats)} repeats"
    found = [
        at_most("wrong_plans_after_slowing", slow, "requests", 5, detail),
        at_most("wrong_plans_after_recovery", after, "requests", 20, detail),
    ]
    for phase in ("before", "slow"):
        for policy in (COMPUTE, FETCH):
            seconds = min(each["rules"][phase][policy]["ttft_s"] for each in repeats)
            found.append(shown(f"{policy}_{phase}", seconds, "s"))
    return found


def last_wrong(repeat: dict[str, Any], phase: str) -> int:
    """How many requests it took from the change to the last wrong plan; 0 if none was wrong.
    Raises ValueError where neither rule was plainly better."""
    rules = repeat["rules"]["slow" if phase == "slow" else "before"]
    compute_s, fetch_s = (rules[policy]["ttft_s"] for policy in (COMPUTE, FETCH))
    if max(compute_s, fetch_s) < 1.2 * min(compute_s, fetch_s):
        raise ValueError(f"{phase}: {compute_s:.2f} s to compute, {fetch_s:.2f} s to fetch")
    right = fetch_s < compute_s
    plans = enumerate(repeat[phase], start=1)
    return max((n for n, each in plans if each["plan"].startswith("fetch") is not right), default=0)


def _repeat(vault: FarVault, size: Size) -> dict[str, Any]:
    rates = {"before": size.fast_bits_per_s, "slow": size.slow_bits_per_s}
    rates["after"] = size.fast_bits_per_s
    counts = {"before": size.before, "slow": size.slow, "after": size.after}
    found: dict[str, Any] = {"rules": {}}
    for phase in ("before", "slow"):
        vault.limit(rates[phase])
        found["rules"][phase] = {
            policy: asdict(vault.ask(policy, RAW, size.prefix_tokens, _SUFFIX_TOKENS))
            for policy in (COMPUTE, FETCH)
        }
    # What the rules' requests have shown of the slow link is unlearned on the fast one.
    vault.limit(rates["before"])
    vault.learn()
    for phase in PHASES:
        vault.limit(rates[phase])
        found[phase] = [
            asdict(vault.ask(OURS, RAW, size.prefix_tokens, _SUFFIX_TOKENS))
            for _ in range(counts[phase])
        ]
        plans = "".join("f" if e["plan"].startswith("fetch") else "c" for e in found[phase])
        print(f"    {phase}: {plans}", flush=True)
    return found
