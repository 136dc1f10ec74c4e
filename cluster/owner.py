"""One cluster of ours on a Ray cluster: who has it, and what a driver that died left of one.

Serve's application outlives the driver that deployed it, and a second `serve` would replace its
replicas under the feet of the first. So whoever serves holds a named actor, which Ray ends with its
driver, however that ends.
"""

from cluster.config import APP
from cluster.errors import StartError

_NAME = f"{APP}-serve"
_ANSWER_S = 10.0
# Ray ends the actor when nobody knows it any more.
_held: list[object] = []
# Whether what runs there is this process's: nobody's is left that was there before.
_cleared: list[bool] = []


class Owner:
    """The actor: it lives as long as its driver does."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self) -> str:
        """Where the driver's cluster answers."""
        return self._url


def claim(url: str) -> None:
    """Take the Ray cluster's one place for a cluster of ours, until this process ends.

    Raises `StartError` while another driver has it, and where Serve runs a configuration of ours
    that it was handed, as by KubeRay: no driver holds anything then.
    """
    import ray

    if _handed_over():
        raise StartError(
            "Serve runs a cluster here by a configuration that it was handed (`serve deploy`, or a "
            "RayService); change or delete it there, or use another Ray cluster"
        )
    owner = ray.remote(Owner).options(name=_NAME, namespace=APP, num_cpus=0)
    try:
        _held.append(owner.remote(url))
    except ValueError:  # the name is taken
        raise StartError(
            f"a cluster already runs on this Ray cluster, at {_holder()}; end it first: by "
            "`ray job stop` if a job runs it, else where its `serve` runs"
        ) from None


def _handed_over() -> bool:
    """Whether our application is one that nobody's `serve` deployed."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import APIType

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:  # Serve does not run
        return False
    there = client.get_serve_details()["applications"].get(APP)
    return there is not None and there["source"] == APIType.DECLARATIVE


def holds() -> bool:
    """Whether this process has it, and what runs there is its own."""
    return bool(_cleared)


def _holder() -> str:
    import ray

    try:
        url: str = ray.get(ray.get_actor(_NAME, APP).url.remote(), timeout=_ANSWER_S)
    except (ValueError, ray.exceptions.RayError):  # it has just ended, or hangs
        return "an address that it does not tell"
    return url


def clear_left() -> bool:
    """End what a driver that died left of a cluster; whether there was anything. For the one who
    has the claim."""
    from ray import serve

    _cleared.append(True)
    if APP not in serve.status().applications:
        return False
    serve.delete(APP)
    return True
