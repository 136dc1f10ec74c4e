"""`breakeven drain`: have Serve move what runs on this Ray node, and wait until it has gone.

For whoever is about to end the node: Kubernetes calls it before a pod's processes are told to stop.
Serve starts a replica's successor elsewhere, where there is room, and stops the one that is here
gracefully: its requests finish, or go on elsewhere.
"""

import time
from collections.abc import Callable

import psutil

from cluster.config import APP
from cluster.errors import StartError

_LOOK_S = 0.5
# Serve's replicas have it in their titles.
_TITLE = f"ray::ServeReplica:{APP}:"


def drain(seconds: float) -> int:
    """0 once nothing of ours runs on this node any more, 1 if that took too long. Raises
    `StartError` where no Ray node runs on this machine."""
    began = time.monotonic()
    _tell_ray(seconds)
    left = await_gone(_running, seconds, time.monotonic, time.sleep)
    print(f"{len(left)} left after {time.monotonic() - began:.0f} s: {', '.join(left) or 'none'}")
    return int(bool(left))


def await_gone(
    running: Callable[[], list[str]],
    seconds: float,
    now: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[str]:
    """What still runs once nothing does, or after so many seconds."""
    deadline = now() + seconds
    while (left := running()) and now() < deadline:
        sleep(_LOOK_S)
    return left


def _running() -> list[str]:
    """Names of our replicas on this node."""
    titles = (process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"]))
    return sorted(title[0].removeprefix(_TITLE) for title in titles if title[0].startswith(_TITLE))


def _tell_ray(seconds: float) -> None:
    """The node takes nothing new, and Serve's controller moves what is there."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    try:
        ray.init(address="auto", logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise StartError(f"no Ray node runs here: {str(error).strip()}") from error
    context = ray.get_runtime_context()
    accepted, why = GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(),
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "breakeven drain",
        # Where a successor finds no place, Serve stops a replica in time to be gone by then.
        int((time.time() + seconds) * 1000),
    )
    ray.shutdown()
    if not accepted:
        raise StartError(f"Ray does not drain this node: {why}")
