"""What a catalogue process knows: blocks that replicas hold, and blocks that they will."""

from collections.abc import Mapping, Sequence

from kv.block import split_keys
from kv.catalogue import Catalogue, Delta, Holder, Tier
from kv.regret import Regret
from router.catalogue.wire import Expect, Found, Taken
from workers.messages import Blocks


class Expectations:
    """What one ingress has sent to replicas and they have not answered.

    While a replica computes a prompt it counts as holding its blocks: siblings of a request that
    is under way follow it instead of computing the same prefix elsewhere.
    """

    def __init__(self) -> None:
        self._blocks = Catalogue(shards=1)
        self._open: dict[str, Expect] = {}
        self._taken: dict[str, Taken] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> tuple[Expect, ...]:
        """All that is expected, oldest first."""
        return tuple(self._open.values())

    def add(self, expect: Expect) -> None:
        """Until `remove`; a name that is open already is replaced."""
        self.remove(expect.name)
        self._open[expect.name] = expect
        self._blocks.add(_holder(expect.epoch), split_keys(expect.keys))
        self._taken[expect.epoch] = self.taken(expect.epoch).plus(_taken(expect, 1))

    def remove(self, name: str) -> None:
        """Nothing, where the name is unknown."""
        expect = self._open.pop(name, None)
        if expect is None:
            return
        # A sibling's own expectation may go with this one; that costs a prediction only.
        self._blocks.remove(_holder(expect.epoch), split_keys(expect.keys))
        left = self._taken.pop(expect.epoch).plus(_taken(expect, -1))
        if left.requests:
            self._taken[expect.epoch] = left

    def depths(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks that are expected, by epoch."""
        return {holder.replica: depth for holder, depth in self._blocks.depths(keys).items()}

    def taken(self, epoch: str) -> Taken:
        """What a replica was sent."""
        return self._taken.get(epoch, Taken())

    def all_taken(self) -> Mapping[str, Taken]:
        """The same of every replica that was sent something."""
        return self._taken


class Holdings:
    """The catalogue of a cluster, and every ingress's expectations."""

    def __init__(self) -> None:
        self._catalogue = Catalogue()
        self._expected: dict[str, Expectations] = {}
        # The tiers behind its paged KV that each replica has told of.
        self._tiers: dict[str, set[Tier]] = {}
        self._regret, self._device_blocks = Regret(), 0

    @property
    def regret(self) -> float:
        """How likely a block that is displaced from paged KV now will be asked for."""
        return self._regret.chance

    def follow(self, epoch: str, blocks: Blocks) -> None:
        """A replica's snapshot, or its next change; of one of its tiers each."""
        if blocks.snapshot:
            self.forget(epoch)
        if blocks.tier is not Tier.DEVICE:
            self._tiers.setdefault(epoch, set()).add(blocks.tier)
        holder = _holder(epoch, blocks.tier)
        stored, removed = tuple(split_keys(blocks.stored)), tuple(split_keys(blocks.removed))
        before = self._catalogue.blocks(holder)
        self._catalogue.apply(Delta(holder, stored, removed))
        if blocks.tier is Tier.DEVICE:
            self._device_blocks += self._catalogue.blocks(holder) - before
            if removed:
                self._regret.evicted(removed, self._device_blocks)

    def forget(self, epoch: str) -> None:
        """A replica is gone, with all its blocks in every tier: what outlives it on disk is its
        successor's to tell of."""
        self._device_blocks -= self.blocks(epoch)
        for tier in (Tier.DEVICE, *self._tiers.pop(epoch, ())):
            self._catalogue.forget(_holder(epoch, tier))

    def sweep(self, max_shards: int) -> int:
        """Give the memory of forgotten replicas back, a little at a time; how many shards are
        still to be swept."""
        return self._catalogue.sweep(max_shards)

    def blocks(self, epoch: str, tier: Tier = Tier.DEVICE) -> int:
        """Blocks that a tier of a replica holds."""
        return self._catalogue.blocks(_holder(epoch, tier))

    def expect(self, ingress: str, expect: Expect) -> None:
        """An ingress has sent a request."""
        self._expected.setdefault(ingress, Expectations()).add(expect)

    def met(self, ingress: str, name: str) -> None:
        """It was answered, or is over."""
        if ingress in self._expected:
            self._expected[ingress].remove(name)

    def leave(self, ingress: str) -> None:
        """An ingress is gone, with all that it expected."""
        self._expected.pop(ingress, None)

    def look(self, ingress: str, keys: Sequence[bytes]) -> Found:
        """What is held, and what the other ingresses expect; an ingress knows its own better."""
        held = self._catalogue.depths(keys)
        if self._tiers:
            depths = {h.replica: depth for h, depth in held.items() if h.tier is Tier.DEVICE}
        else:
            depths = {h.replica: depth for h, depth in held.items()}
        taken: dict[str, Taken] = {}
        for other, expected in self._expected.items():
            if other == ingress or not len(expected):
                continue
            depths = deepest(depths, expected.depths(keys))
            for epoch, more in expected.all_taken().items():
                taken[epoch] = taken.get(epoch, Taken()).plus(more)
        return Found(depths, taken, _further(held, depths) if self._tiers else {})

    def asked(self, keys: Sequence[bytes], found: Found) -> None:
        """A prompt of these blocks was looked up, and this was the answer."""
        self._regret.asked(keys, max(found.depths.values(), default=0))


def _further(held: Mapping[Holder, int], depths: Mapping[str, int]) -> dict[str, dict[Tier, int]]:
    """What tiers hold beyond the paged KV of their replica; of a vault all: others may fetch it."""
    further: dict[str, dict[Tier, int]] = {}
    for (epoch, tier), depth in held.items():
        if depth > depths.get(epoch, 0) or tier is Tier.VAULT:
            further.setdefault(epoch, {})[tier] = depth
    return further


def deepest(depths: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """The deeper of both, by epoch. `more` is the shorter as a rule: often it is empty."""
    if not more:
        return depths
    merged = dict(depths)
    for epoch, depth in more.items():
        merged[epoch] = max(depth, merged.get(epoch, 0))
    return merged


def _taken(expect: Expect, sign: int) -> Taken:
    tokens = expect.prefill_tokens
    return Taken(sign, sign * (tokens > 0), sign * tokens)


def _holder(epoch: str, tier: Tier = Tier.DEVICE) -> Holder:
    return Holder(epoch, tier)
