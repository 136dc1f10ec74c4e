"""What a simulated engine is: how long things take on it, what it says of itself, and what it is
asked and answers."""

from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64_intdigest

from kv.curve import LinkCurve, PrefillCurve
from workers.messages import Replica, Role
from workers.sim_run import sim_token

# Any fit through these points gives the curve back.
_SAMPLED = ((32, 0), (512, 0), (2048, 0), (512, 2048))
PREFILL = PrefillCurve(0.02, 0.0005, 1e-8)
LINK = LinkCurve(0.005, 1e-9)
HOST = LinkCurve(0.005, 5e-10)
PEER = LinkCurve(0.005, 1e-9)


@dataclass(frozen=True, slots=True)
class SimCosts:
    """How long things take on one simulated engine; `link` is what reading a handoff costs, `host`
    what fetching from its host tier of `host_blocks` costs. One that `lends` gives peers blocks out
    of its host tier, and takes theirs for what `peer` costs; it gives one up that says nothing for
    `answer_s`. Without a curve of a `vault` there is none. Prompts that give way are computed by
    `chunk_tokens`."""

    prefill: PrefillCurve = PREFILL
    link: LinkCurve = LINK
    step_s: float = 0.02
    lease_s: float = 30.0
    host: LinkCurve = HOST
    host_blocks: int = 0
    lends: bool = False
    peer: LinkCurve = PEER
    answer_s: float = 2.0
    vault: LinkCurve | None = None
    chunk_tokens: int = 512


def sim_body(max_tokens: int, salt: str = "") -> bytes:
    """What to ask of a simulated engine: an answer of so many tokens, and a salt if any."""
    return f"{max_tokens} {salt}".strip().encode()


def sim_answer(tokens: bytes, n_tokens: int) -> list[int]:
    """The only right answer to a prompt of packed tokens."""
    digest = xxh3_64_intdigest(tokens)
    return [sim_token(digest, position) for position in range(n_tokens)]


def sim_replica(name: str, role: Role, costs: SimCosts, **shape: Any) -> Replica:
    """How a simulated engine announces itself; `shape` replaces fields of `Replica`."""
    fields: dict[str, Any] = {
        "epoch": f"{name}/1",
        "address": f"sim://{name}",
        "node": "sim",
        "pid": 0,
        "model": "sim",
        "block_tokens": 16,
        "kv_bytes_per_token": 46_080,
        "kv_blocks": 4096,
        "max_num_seqs": 64,
        "prefill_samples": tuple((*at, costs.prefill.seconds(*at)) for at in _SAMPLED),
        "step_s": costs.step_s,
    }
    fields |= shape
    if costs.lends:
        room_tokens = costs.host_blocks // 2 * fields["block_tokens"]
        fields |= {"peer_address": f"sim://{fields['epoch']}", "room_tokens": room_tokens}
    return Replica(name=name, role=role, **fields)
