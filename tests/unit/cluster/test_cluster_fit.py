"""Whether Ray's nodes have room."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config, load
from cluster.fit import Need, Room, misfit, needs, of_pool

NAMES = ("CPU", "GPU", "far")
BESIDE = {"node:10.0.0.1": 0.001}

amounts = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=1)


def room(name: str, **free: float) -> Room:
    return Room(name, free)


def config(**sections: object) -> Config:
    return load(None, sections)


@given(
    st.lists(st.tuples(amounts, st.lists(st.integers(0, 2), min_size=1, max_size=4)), max_size=4)
)
def test_what_fits_is_never_refused(placed: list[tuple[dict[str, float], list[int]]]) -> None:
    """Nodes that have exactly what some placement takes have room."""
    taken = [Counter[str]() for _ in range(3)]
    for each, nodes in placed:
        for node in nodes:
            taken[node].update(each)  # type: ignore[arg-type]
    wanted = [Need(f"kind-{i}", len(nodes), each) for i, (each, nodes) in enumerate(placed)]
    rooms = [Room(f"10.0.0.{i}", dict(free)) for i, free in enumerate(taken)]
    assert misfit(wanted, rooms) is None


@given(amounts, st.integers(1, 4), st.sampled_from([0.5, 1.0]))
def test_less_than_the_sum_is_always_refused(
    each: dict[str, float], count: int, lacked: float
) -> None:
    """However it is spread over nodes."""
    total = {name: count * amount for name, amount in each.items()}
    short = next(iter(total))
    rooms = [Room("10.0.0.1", {**total, short: total[short] - min(lacked, total[short])})]
    assert misfit([Need("decode", count, each)], rooms)


def test_a_refusal_tells_the_numbers() -> None:
    """Which kind, what each takes, how many places there are; or which sum."""
    rooms = [room("10.0.0.1", CPU=4, GPU=1), room("10.0.0.2", CPU=4, GPU=1)]
    assert misfit([Need("prefill", 4, {"CPU": 1, "GPU": 1})], rooms) == (
        "prefill: 4 wanted, each with 1 CPU, 1 GPU, and Ray's nodes have room for 2"
    )
    halves = [Need("prefill", 2, {"CPU": 3}), Need("decode", 2, {"CPU": 2})]
    assert misfit(halves, rooms) == "10 CPU wanted in all, 8 free on Ray's nodes"


def test_what_keeps_to_the_node_of_serve_counts_there_alone() -> None:
    """An ingress has no place on a node with room that is another one."""
    wanted = needs(config(prefill={"replicas": 0}), BESIDE)
    nodes = [Room("10.0.0.1", {"CPU": 0.2, "node:10.0.0.1": 1}), room("10.0.0.2", CPU=8)]
    assert misfit(wanted, nodes) == (
        "ingress: 1 wanted, each with 1 CPU, a place on 10.0.0.1, and Ray's nodes have room for 0"
    )


def test_all_that_is_configured_is_counted() -> None:
    """Pools, ingresses, catalogues and vault shards; not a pool of none."""
    tiers = {"vault": {"shards": 3, "memory_bytes": 1 << 28}}
    found = needs(config(prefill={"replicas": 0}, tiers=tiers), {})
    assert [(need.kind, need.count) for need in found] == [
        ("decode", 1),
        ("ingress", 1),
        ("catalogue", 1),
        ("vault", 3),
    ]


@pytest.mark.parametrize(
    ("device", "ranks", "gpus"), [("cpu", 2, None), ("cuda", 1, 1.0), ("cuda", 4, 4.0)]
)
def test_an_engine_takes_a_gpu_a_rank(device: str, ranks: int, gpus: float | None) -> None:
    """And its cores, and what its pool names."""
    made = config(
        device=device, decode={"engine": {"tensor_parallel_size": ranks}, "resources": {"rack": 1}}
    )
    taken = of_pool(made, made.decode)
    assert taken.get("GPU") == gpus
    assert (taken["CPU"], taken["rack"]) == (1.0, 1.0)
