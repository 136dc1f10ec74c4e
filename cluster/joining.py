"""What is looked at before anything is started on a Ray cluster that is somebody else's, too."""

import time
from collections.abc import Mapping
from pathlib import Path

from cluster import owner
from cluster.config import Config
from cluster.errors import StartError
from cluster.fit import Need, Room, misfit, needs
from cluster.survey import facts, survey, unlike

# What was ended a moment ago gives its resources back within this.
_FREED_S, _LOOK_S = 10.0, 0.5


def check(config: Config, model: Path | str, beside: Mapping[str, float]) -> None:
    """Take this Ray cluster for ours, and clear away what a driver that died left there.

    Raises `StartError` while another cluster of ours runs there, for nodes that lack what replicas
    need, and for too few resources.
    """
    import ray

    owner.claim(config.ingress.url)
    folder = str(model) if isinstance(model, Path) else None
    _refuse(unlike(facts(ray.util.get_node_ip_address(), folder), survey(folder), folder))
    # What it holds is free once it is gone.
    if owner.clear_left():
        print("a cluster that its driver left behind was cleared away", flush=True)
    _refuse(_await_room(needs(config, beside)))


def _refuse(complaint: str | None) -> None:
    if complaint is not None:
        raise StartError(f"this Ray cluster cannot run what is configured: {complaint}")


def _await_room(wanted: list[Need]) -> str | None:
    deadline_s = time.monotonic() + _FREED_S
    while (complaint := misfit(wanted, _rooms())) and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
    return complaint and f"{complaint}; add nodes, ask for less, or end what else runs there"


def _rooms() -> list[Room]:
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Room(node["NodeManagerAddress"], free.get(node["NodeID"], {})) for node in alive]
