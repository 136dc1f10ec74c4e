"""`breakeven calibrate --codecs`: measure codecs on an engine of this model, and keep the verdicts.

The engine runs in this process, with the decode pool's options and a host tier.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import verdicts
from cluster.config import Config, cache_dir, engine_options
from cluster.errors import ConfigError
from kv.codecs.codec import CodecName
from kv.codecs.gate import Verdict
from kv.errors import CodecError
from workers.connector import transfer_config
from workers.messages import Role
from workers.tiers import HostTier, Tiers, model_identity, with_tiers

# Room for the longest prompt of a model with 320 KiB of KV a token.
_HOST_BYTES = 1 << 29


def calibrate(config: Config, names: Sequence[CodecName], as_json: bool) -> int:
    """Print a row for each codec; 1 if one of those that were named may not be used. Raises
    `ConfigError` for a model that has no codecs."""
    from cluster.app import environment
    from cluster.launch import find_model

    model = find_model(config)
    # Read by vLLM and its libraries when they load.
    os.environ.update(environment(config, model, len(os.sched_getaffinity(0))))
    from kv.codecs.table import CODECS
    from workers import options, quality

    engine = engine_options(config, config.decode)
    identity = model_identity(str(model), engine)
    wanted = [CODECS[name] for name in names or CodecName if not CODECS[name].lossless]
    parsed = options.namespace(str(model), config.served_names, engine)
    print(f"{len(wanted)} codecs on {model}; this takes minutes", file=sys.stderr)
    try:
        found = quality.measure(
            options.engine_config(parsed, _host_tier(identity, config), events=False), wanted
        )
    except CodecError as error:
        raise ConfigError(str(model), str(error)) from error
    verdicts.keep(cache_dir(), identity, {**found.verdicts, **dict.fromkeys(found.refused)})
    rows = [
        _row(cache_dir(), identity, codec.name, found.verdicts, found.refused) for codec in wanted
    ]
    print(json.dumps({"model": identity, "codecs": rows}) if as_json else _shown(rows))
    return int(bool(names) and not all(row["allowed"] for row in rows))


def _host_tier(identity: str, config: Config) -> Mapping[str, Any]:
    """vLLM's `kv_transfer_config` of an engine with a host tier and no handoffs."""
    handoffs = transfer_config(Role.DECODE, config.device, config.kv.lease_s)
    both = with_tiers(handoffs, Tiers(host=HostTier(bytes=_HOST_BYTES)), identity)
    tier: Mapping[str, Any] = both["kv_connector_extra_config"]["connectors"][1]
    return tier


def _row(
    cache: Path,
    identity: str,
    name: CodecName,
    measured: Mapping[CodecName, Verdict],
    refused: Mapping[CodecName, str],
) -> dict[str, Any]:
    if name in refused:
        return {"codec": name, "allowed": False, "reason": "refused", "detail": refused[name]}
    decision, verdict = verdicts.decision(verdicts.read(cache), identity, name), measured[name]
    return {
        "codec": name,
        "allowed": decision.allowed,
        "reason": decision.reason,
        "detail": decision.detail,
        "tokens": verdict.tokens,
        "agreed_tokens": verdict.agreed_tokens,
        "max_logprob_delta": verdict.max_logprob_delta,
    }


def _shown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        may = "may be used" if row["allowed"] else "may not be used"
        counts = f", {row['agreed_tokens']} of {row['tokens']} tokens" if "tokens" in row else ""
        lines.append(f"{row['codec']}: {may} ({row['reason']}: {row['detail']}{counts})")
    return "\n".join(lines)
