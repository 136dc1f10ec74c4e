"""What /admin tells, as JSON: replicas, the catalogue, decisions, curves."""

from dataclasses import asdict
from typing import Any

from kv.catalogue import Tier
from router.audit import Record, Shadowed
from router.catalogue.wire import Line
from router.fleet import Fleet
from router.forget import Outcome
from router.member import Member, tier_bytes
from router.tier_curves import curve_of


def replica_row(fleet: Fleet, member: Member) -> dict[str, Any]:
    replica, load = member.replica, member.load
    warmed = [pair for pair in fleet.pairs.links if member.name in pair]
    return {
        "name": replica.name,
        "role": replica.role,
        "state": "up" if member.up else "down",
        "pid": replica.pid,
        "node": replica.node,
        "running": load.running,
        "waiting": load.waiting,
        "pending_prefill_tokens": load.pending_prefill_tokens,
        "leased": load.leased,
        "kv_usage": round(load.kv_usage, 4),
        "kv_blocks": replica.kv_blocks,
        "cached_blocks": fleet.cached_blocks(member),
        "tiers": {tier: _tier(member, tier) for tier in load.tiers},
        "warmed_pairs": len(warmed),
        "lanes": list(load.lanes),
        "transfer_bytes": load.totals.transfer_bytes,
        "failed_transfers": load.totals.failed_transfers,
        "kv_bytes_per_token": replica.kv_bytes_per_token,
        "max_num_seqs": replica.max_num_seqs,
    }


def _tier(member: Member, tier: Tier) -> dict[str, Any]:
    told = member.load.tiers[tier]
    return {
        "blocks": told.blocks,
        "unnamed_blocks": told.unnamed,
        "bytes": tier_bytes(member, tier),
        "latency_s": told.latency_s,
        "bytes_per_s": curve_of(told).bytes_per_s,
    }


def catalogue_row(line: Line) -> dict[str, Any]:
    beat = line.beat
    return {
        "state": "up" if line.up else "down",
        "pid": beat.pid,
        "blocks": sum(beat.blocks.values()),
        "lag_s": round(beat.lag_s, 6),
    }


def forgotten_report(tenant: str, outcomes: list[Outcome]) -> dict[str, Any]:
    rows = [asdict(outcome) for outcome in outcomes]
    complete = bool(outcomes) and all(outcome.complaint is None for outcome in outcomes)
    return {"tenant": tenant, "complete": complete, "replicas": rows}


def decision_row(record: Record) -> dict[str, Any]:
    plan = record.plan
    return {
        "request_id": record.request_id,
        "class": record.service_class,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens(),
        "sources": record.sources(),
        "generated_tokens": record.generated_tokens,
        "outcome": record.outcome if record.ended_at is not None else "running",
        "plan": plan.header(),
        "prefill": plan.prefill,
        "decode": plan.decode,
        "plans": len(record.plans),
        "shadow": None if record.shadow is None else _shadow(record.shadow),
        "predicted_ttft_s": round(plan.predicted_ttft_s, 6),
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
        "rivals": [
            {
                "shape": rival.shape,
                "prefill": rival.prefill,
                "decode": rival.decode,
                "predicted_ttft_s": round(rival.predicted_ttft_s, 6),
                "cost_s": round(rival.cost_s, 6),
            }
            for rival in plan.rivals
        ],
    }


def _shadow(shadow: Shadowed) -> dict[str, Any]:
    plan = shadow.plan
    return {
        "policy": shadow.policy,
        "outcome": shadow.outcome,
        "plan": None if plan is None else plan.header(),
        "prefill": None if plan is None else plan.prefill,
        "decode": None if plan is None else plan.decode,
        "predicted_ttft_s": None if plan is None else round(plan.predicted_ttft_s, 6),
    }
