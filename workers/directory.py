"""What replicas and a vault's shards say of themselves in Ray's GCS, where others look them up.

A record each, renewed while it lives; `workers.announce` writes them.
"""

import msgspec

from workers.messages import Replica

# Where announcements lie in Ray's GCS, and how often each is renewed.
DIRECTORY_NAMESPACE = b"breakeven"
RENEW_S = 2.0


class Announcement(msgspec.Struct, frozen=True):
    """A replica's record in the directory; `beat` grows with each renewal."""

    replica: Replica
    beat: int


def directory_prefix(cluster: str) -> str:
    """The key prefix of all announcements of one cluster."""
    return f"replicas/{cluster}/"


class Shard(msgspec.Struct, frozen=True):
    """Who a vault's shard is; constant for the life of its process."""

    name: str
    epoch: str
    address: str
    node: str
    pid: int
    quota_bytes: int = 0
    # Host and port that answer Prometheus.
    metrics_address: str = ""


class ShardRecord(msgspec.Struct, frozen=True):
    """A shard's record in the directory; `beat` grows with each renewal. `stored_bytes` are of
    frames, by codec."""

    shard: Shard
    beat: int
    blocks: int = 0
    stored_bytes: dict[str, int] = {}


def shard_prefix(cluster: str) -> str:
    """The key prefix of all vault shards of one cluster; behind it comes a shard's name, so that
    a restarted one takes its predecessor's place."""
    return f"vault/{cluster}/"
