"""The real engine behaves at the other end of a link as the simulator does."""

import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kv.block import pack_tokens
from tests.contract.link_behaviour import BEHAVIOURS, LENDING, Stage
from tests.flow.replica_process import SECRET, replicas
from workers.channel import ChannelLink
from workers.curve import client_keys
from workers.messages import Inbox, Link, Replica


@pytest.fixture(scope="module", params=["handoffs", "tiers"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[tuple[Replica, Replica]]:
    """Replicas that hand off, and such that have tiers as well, and lend."""
    folder, tiers = tmp_path_factory.mktemp("replicas"), None
    if request.param == "tiers":
        disk = {"path": str(folder / "disk"), "bytes": 1 << 26}
        tiers = {"host": {"bytes": 1 << 25}, "disk": disk, "peer": {"timeout_s": 1.0}}
    with replicas(tiny_model, folder, tiers) as started:
        yield started


@pytest.mark.parametrize("number", range(len(BEHAVIOURS)), ids=[b.__name__ for b in BEHAVIOURS])
async def test_a_real_replica_does_what_the_simulator_does(
    pair: tuple[Replica, Replica], number: int
) -> None:
    """Each behaviour of the shared suite, on vLLM engines over ZMQ and NIXL."""
    await _does(pair, BEHAVIOURS[number], number)


@pytest.mark.parametrize("pair", ["tiers"], indirect=True, scope="module")
@pytest.mark.parametrize("number", range(len(LENDING)), ids=[b.__name__ for b in LENDING])
async def test_a_real_replica_lends_as_the_simulator_does(
    pair: tuple[Replica, Replica], number: int
) -> None:
    """The same of what only replicas with a peer tier do."""
    await _does(pair, LENDING[number], len(BEHAVIOURS) + number)


async def _does(
    pair: tuple[Replica, Replica], behaviour: Callable[[Stage], Awaitable[None]], number: int
) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from router.client import body_of

    def body(n_tokens: int, salt: str | None = None) -> bytes:
        params = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
        request = EngineCoreRequest("x", None, None, params, None, 0.0, None, salt, None)
        return body_of(request)

    def prompt(which: int) -> bytes:
        rng = random.Random(1000 * number + which)
        return pack_tokens([rng.randrange(1000, 40_000) for _ in range(5 * 32 + 7)])

    def to(replica: Replica):  # type: ignore[no-untyped-def]
        def connect(inbox: Inbox) -> Link:
            return ChannelLink(replica.address, "contract", inbox, client_keys(SECRET), follow=True)

        return connect

    prefill, decode = pair
    stage = Stage(to(prefill), to(decode), prompt, body, body, prefill.block_tokens)
    await behaviour(stage)
