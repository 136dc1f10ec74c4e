"""`breakeven kv-size`: how many bytes of KV a model's tokens and requests take."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import model_config
from cluster.errors import ModelConfigError
from kv.errors import SizeError
from kv.geometry import (
    FullAttention,
    Geometry,
    LatentAttention,
    LayerGroup,
    SlidingAttention,
    group_bytes,
)
from kv.hf import config as hf
from kv.hf.config import Model
from kv.hf.fields import SUBJECT

GIB = 1 << 30
# Requests that are shown whatever is asked for.
_USUAL_TOKENS = (1024, 8192)


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command; a dtype of None is the config's."""

    model: str
    tokens: int | None = None
    dtype: str | None = None
    state_dtype: str | None = None
    ranks: int = 1
    as_json: bool = False


def kv_size(asked: Asked) -> int:
    """Print the sizes. Raises `ModelConfigError` for a config that cannot be read or is not
    known."""
    path, config = model_config.read(asked.model)
    try:
        model = hf.read(config, dtype=asked.dtype, state_dtype=asked.state_dtype)
        rank = model.geometry.on_rank(asked.ranks)
    except SizeError as error:
        complaint = str(error).removeprefix(f"{SUBJECT}: ")
        raise ModelConfigError(str(path), complaint) from error
    report = {"config": str(path), **_report(model, rank, asked)}
    if asked.as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _report(model: Model, rank: Geometry, asked: Asked) -> dict[str, Any]:
    """Bytes are sums over all ranks, but for those of one rank."""
    lengths = sorted({*_USUAL_TOKENS, asked.tokens or _USUAL_TOKENS[0]})
    return {
        "model_type": model.model_type,
        "kv_dtype": model.kv_dtype,
        "state_dtype": model.state_dtype if rank.state_bytes() else None,
        "ranks": asked.ranks,
        **_sizes(rank, asked.ranks),
        "rank": _sizes(rank, 1),
        "requests": [_request(rank, asked.ranks, tokens) for tokens in lengths],
        "groups": [_group(group, asked.ranks, lengths) for group in rank.groups],
    }


def _sizes(rank: Geometry, ranks: int) -> dict[str, int]:
    return {
        "bytes_per_token": ranks * rank.bytes_per_token(),
        "bytes_per_token_past_windows": ranks * rank.bytes_per_token_past_windows(),
        "state_bytes": ranks * rank.state_bytes(),
    }


def _request(rank: Geometry, ranks: int, tokens: int) -> dict[str, int]:
    rank_bytes = rank.request_bytes(tokens)
    return {
        "tokens": tokens,
        "bytes": ranks * rank_bytes,
        "rank_bytes": rank_bytes,
        "fit_in_gib_a_rank": GIB // rank_bytes,
    }


def _group(group: LayerGroup, ranks: int, lengths: list[int]) -> dict[str, Any]:
    return {
        "keeps": _keeps(group),
        "layers": group.layers,
        "window_tokens": group.window_tokens,
        "bytes_per_token": ranks * group.token_bytes,
        "state_bytes": ranks * group.state_bytes,
        "request_bytes": [ranks * group_bytes(group, tokens) for tokens in lengths],
    }


def _keeps(group: LayerGroup) -> str:
    """What a layer of the group keeps, on one rank."""
    match group:
        case FullAttention():
            return f"K and V, {group.kv_heads} heads x {group.head_dim}"
        case SlidingAttention():
            shape = f"{group.kv_heads} heads x {group.head_dim}"
            return f"K and V, {shape}, last {group.window_tokens:,} tokens"
        case LatentAttention():
            return f"latent vector, {group.latent_dim}"
        case _:
            return "state"


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(_headline(report), soft_wrap=True)
    console.print(_table(report))


def _headline(report: dict[str, Any]) -> str:
    whole, past = report["bytes_per_token"], report["bytes_per_token_past_windows"]
    line = f"{report['model_type']}: {whole:,} bytes of {report['kv_dtype']} KV a token"
    if past != whole:
        line += f", {past:,} past the window"
    if report["state_bytes"]:
        line += f"; {report['state_bytes']:,} of state a request ({report['state_dtype']})"
    if report["ranks"] > 1:
        each = report["rank"]["bytes_per_token"]
        line += f"; over {report['ranks']} ranks, {each:,} a token on each"
    return line


def _table(report: dict[str, Any]) -> Table:
    requests = report["requests"]
    table = Table("layers", "each keeps", "a token")
    for request in requests:
        table.add_column(f"{request['tokens']:,} tokens", justify="right")
    for group in report["groups"]:
        cells = map(_size, (group["bytes_per_token"], *group["request_bytes"]))
        table.add_row(str(group["layers"]), group["keeps"], *cells)
    table.add_section()
    whole = map(_size, (report["bytes_per_token"], *(each["bytes"] for each in requests)))
    table.add_row("all", "", *whole)
    fitting = (f"{each['fit_in_gib_a_rank']:,}" for each in requests)
    table.add_row("", "requests in a GiB" + " a rank" * (report["ranks"] > 1), "", *fitting)
    return table


def _size(n_bytes: int) -> str:
    """In the largest unit that leaves a whole part, with two decimals where they say something."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.2f}".rstrip("0").rstrip(".") + f" {unit}"
