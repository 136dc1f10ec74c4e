"""Whether Ray's nodes have room for what is configured.

Serve waits without a word for a node that never comes; so this is looked at before it is asked.
Only what is certain is refused: each replica alone, each kind's count, and the sums. Where all that
holds, pieces may still not fit together, and Serve's own progress shows it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor

from cluster.config import Config, Pool

# Ray keeps resources in ten-thousandths.
_GRAIN = 1e-4
# Each node has one of its own, by which things are placed on it.
_OF_A_NODE = "node:"


@dataclass(frozen=True, slots=True)
class Need:
    """So many processes of a kind, and Ray's resources that each takes from its node."""

    kind: str
    count: int
    each: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Room:
    """What a node has free, by Ray's names; `name` is its address."""

    name: str
    free: Mapping[str, float]


def of_pool(config: Config, pool: Pool) -> dict[str, float]:
    """What one engine takes."""
    gpus = config.tensor_parallel(pool) if config.device == "cuda" else 0
    return {"CPU": pool.cpus, **({"GPU": float(gpus)} if gpus else {}), **pool.resources}


def needs(config: Config, beside: Mapping[str, float]) -> list[Need]:
    """Of the whole cluster; `beside` is what keeps a process on the node of `serve`."""
    ingress, catalogue, vault = config.ingress, config.catalogue, config.tiers.vault
    near = {} if catalogue.replicas > 1 else beside
    found = [
        Need("prefill", config.prefill.replicas, of_pool(config, config.prefill)),
        Need("decode", config.decode.replicas, of_pool(config, config.decode)),
        Need("ingress", ingress.replicas, {"CPU": ingress.cpus, **(ingress.resources or beside)}),
        Need(
            "catalogue",
            catalogue.replicas,
            {"CPU": catalogue.cpus, **(catalogue.resources or near)},
        ),
    ]
    if vault is not None:
        found.append(Need("vault", vault.shards, {"CPU": vault.cpus, **vault.resources}))
    return [need for need in found if need.count]


def misfit(wanted: Sequence[Need], rooms: Sequence[Room]) -> str | None:
    """Why they cannot all run there, with the numbers; None where nothing is plainly wrong."""
    for need in wanted:
        places = sum(_places(need.each, room.free) for room in rooms)
        if places < need.count:
            return (
                f"{need.kind}: {need.count} wanted, each with {_said(need.each)}, "
                f"and Ray's nodes have room for {places}"
            )
    for name, amount in _summed(wanted):
        free = sum(room.free.get(name, 0.0) for room in rooms)
        if amount > free + _GRAIN:
            return f"{_amount(amount)} {name} wanted in all, {_amount(free)} free on Ray's nodes"
    return None


def _places(each: Mapping[str, float], free: Mapping[str, float]) -> int:
    """How many would fit on a node that ran nothing else."""
    asked = {name: amount for name, amount in each.items() if amount > 0}
    fits = (floor((free.get(name, 0.0) + _GRAIN) / amount) for name, amount in asked.items())
    return min(fits, default=0)


def _summed(wanted: Sequence[Need]) -> Iterator[tuple[str, float]]:
    total: Counter[str] = Counter()
    for need in wanted:
        for name, amount in need.each.items():
            total[name] += need.count * amount  # type: ignore[assignment]
    return ((name, amount) for name, amount in total.items() if not name.startswith(_OF_A_NODE))


def _said(each: Mapping[str, float]) -> str:
    words = [
        f"a place on {name.removeprefix(_OF_A_NODE)}"
        if name.startswith(_OF_A_NODE)
        else f"{_amount(amount)} {name}"
        for name, amount in each.items()
    ]
    return ", ".join(words)


def _amount(amount: float) -> str:
    return f"{round(amount, 4):g}"
