"""The `breakeven` command."""

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.config import load
from cluster.errors import ClusterError, ConfigError
from kv.codecs.codec import CodecName
from router.access import digest
from router.intake import REQUEST_ID
from router.policy import Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; errors of ours are one line on stderr and exit status 1."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="breakeven",
        description="A disaggregated LLM serving cluster: prefill and decode in separate pools.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add(commands, "status", _status, "what runs: replicas, load, cache, links")
    _add(commands, "doctor", _doctor, "what is wrong with this machine or cluster, and the remedy")
    _add_batch(commands)
    _add_restart(commands)
    _add_policy(commands)
    _add_explain(commands)
    _add_key(commands)
    _add_forget(commands)
    _add_kv_size(commands)
    _add_calibrate(commands)
    _add_drain(commands)
    _add(commands, "down", _down, "end a cluster, or what a crashed one left behind")
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="run a cluster until Ctrl-C")
    serve.add_argument("--config", type=Path, help="a YAML file; keys as in configs/cpu.yaml")
    serve.add_argument("--prefill", type=int, metavar="N", help="prefill replicas")
    serve.add_argument("--decode", type=int, metavar="N", help="decode replicas")
    serve.add_argument("--model", help="a model folder or hub name")
    serve.add_argument("--host", help="address of the HTTP side")
    serve.add_argument("--port", type=int, help="port of the HTTP side")
    serve.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="K=V",
        help="an option of vLLM's, for every engine and the API server; may be repeated",
    )
    serve.set_defaults(run=_serve)


def _add_batch(commands: Any) -> None:
    about = "send a file of requests as work that nobody waits for; run again, it goes on"
    batch = commands.add_parser("batch", help=about)
    batch.add_argument("requests", type=Path, metavar="IN", help="JSON lines, as OpenAI's batches")
    batch.add_argument("answers", type=Path, metavar="OUT", help="where answers are added")
    batch.add_argument(
        "--concurrency", type=_count, default=32, metavar="N", help="at once; 32 by default"
    )
    batch.add_argument("--url", help="of another cluster than this machine's")
    batch.add_argument("--json", action="store_true", help="for programs")
    batch.set_defaults(run=_batch)


def _add_drain(commands: Any) -> None:
    about = "have Serve move what runs on this Ray node, before it goes"
    drain = commands.add_parser("drain", help=about)
    drain.add_argument(
        "--seconds", type=_seconds, default=60.0, metavar="S", help="at most; 60 by default"
    )
    drain.set_defaults(run=_drain)


def _add_restart(commands: Any) -> None:
    restart = commands.add_parser("restart", help="replace replicas one by one; no stream is lost")
    restart.add_argument(
        "pools", nargs="*", metavar="POOL", help="prefill, decode; both by default"
    )
    restart.set_defaults(run=_restart)


def _add_policy(commands: Any) -> None:
    about = "which routing policy is in force; with NAME put another in force"
    policy = commands.add_parser("policy", help=about)
    names = [str(each) for each in Policy]
    policy.add_argument("name", nargs="?", choices=names, metavar="NAME", help=", ".join(names))
    policy.add_argument(
        "--shadow", choices=[*names, "none"], metavar="NAME", help="what plans for comparison"
    )
    policy.add_argument("--json", action="store_true", help="for programs")
    policy.set_defaults(run=_policy)


def _add_explain(commands: Any) -> None:
    about = "what was planned for one request, why, and what came of it"
    explain = commands.add_parser("explain", help=about)
    explain.add_argument(
        "request_id",
        type=_request_id,
        metavar="REQUEST_ID",
        help="as in the response header x-request-id",
    )
    explain.add_argument(
        "--file", type=Path, help="an audit's file or folder, instead of this cluster's"
    )
    explain.add_argument("--json", action="store_true", help="for programs")
    explain.set_defaults(run=_explain)


def _add_key(commands: Any) -> None:
    key = commands.add_parser("key", help="make an API key, and its line for the key file")
    key.add_argument("tenant", nargs="?", help="whose key; without it an admin key")
    key.set_defaults(run=_key)


def _add_forget(commands: Any) -> None:
    forget = commands.add_parser("forget", help="erase a tenant's cached blocks on every replica")
    forget.add_argument(
        "--tenant", required=True, help="as in the key file; without one everybody is `default`"
    )
    forget.add_argument("--json", action="store_true", help="for programs")
    forget.set_defaults(run=_forget)


def _add_kv_size(commands: Any) -> None:
    size = commands.add_parser("kv-size", help="bytes of KV a token and a request of a model take")
    size.add_argument("model", metavar="MODEL", help="a folder, a config.json, or `default`")
    size.add_argument("--tokens", type=_count, metavar="N", help="a request's length")
    size.add_argument("--dtype", metavar="D", help="instead of the config's; fp8 is for KV alone")
    size.add_argument("--state-dtype", metavar="D", help="of linear attention and mamba states")
    size.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor-parallel ranks")
    size.add_argument("--json", action="store_true", help="for programs")
    size.set_defaults(run=_kv_size)


def _add_calibrate(commands: Any) -> None:
    about = "measure now what a running cluster's replicas and links cost; or codecs"
    calibrate = commands.add_parser("calibrate", help=about)
    calibrate.add_argument(
        "--codecs",
        nargs="*",
        choices=[str(each) for each in CodecName],
        metavar="CODEC",
        help="instead, what these (every lossy one by default) do to the model's answers, on an "
        "engine of its own",
    )
    calibrate.add_argument(
        "--seconds", type=_seconds, default=5.0, metavar="S", help="to probe for; 5 by default"
    )
    about = "draw points, fits and crossovers there, as PNG, SVG or PDF"
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help=about)
    calibrate.add_argument("--config", type=Path, help="a YAML file; keys as in configs/cpu.yaml")
    calibrate.add_argument("--model", help="a model folder or hub name")
    calibrate.add_argument("--json", action="store_true", help="for programs")
    calibrate.set_defaults(run=_calibrate)


def _request_id(text: str) -> str:
    """As requests may have it."""
    if not REQUEST_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none: 1 to 128 visible characters")
    return text


def _count(text: str) -> int:
    """A whole number from 1 to 2^40: more tokens or ranks than anybody has."""
    count = int(text) if text.isascii() and text.isdigit() and len(text) <= 13 else 0
    if not 1 <= count <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to 2^40")
    return count


def _seconds(text: str) -> float:
    """From a tenth of a second to five minutes."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 300.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of seconds from 0.1 to 300")
    return seconds


def _add(commands: Any, name: str, run: Any, about: str) -> None:
    command = commands.add_parser(name, help=about)
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=run)


def _serve(arguments: argparse.Namespace) -> int:
    # Ray loads late: status and doctor answer without it.
    from cluster.launch import serve

    return serve(load(arguments.config, _overrides(arguments)))


def _batch(arguments: argparse.Namespace) -> int:
    from cluster.batch import Asked, batch

    files = (arguments.requests, arguments.answers)
    return batch(Asked(*files, arguments.concurrency, arguments.url, arguments.json))


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `serve` as the sections of the file."""
    sections: dict[str, Any] = {"engine": dict(map(_engine_arg, arguments.engine_arg))}
    given = {
        ("model",): arguments.model,
        ("prefill", "replicas"): arguments.prefill,
        ("decode", "replicas"): arguments.decode,
        ("ingress", "host"): arguments.host,
        ("ingress", "port"): arguments.port,
    }
    for path, value in given.items():
        if value is not None:
            *section, key = path
            (sections.setdefault(section[0], {}) if section else sections)[key] = value
    return sections


def _engine_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--engine-arg {text}", "no K=V")
    return name.replace("-", "_"), yaml.safe_load(value)


def _key(arguments: argparse.Namespace) -> int:
    key = f"bk-{secrets.token_urlsafe(32)}"
    if arguments.tenant is None:
        line = f"admin:\n  - {digest(key)}"
    else:
        line = f"keys:\n  - {{sha256: {digest(key)}, tenant: {json.dumps(arguments.tenant)}}}"
    print(f"{key}\n\nin the key file, which holds no key itself:\n{line}")
    return 0


def _policy(arguments: argparse.Namespace) -> int:
    from cluster.policy import policy

    return policy(_change(arguments), arguments.json)


def _change(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What `policy` was told to change; empty to only look."""
    change: dict[str, str | None] = {}
    if arguments.name is not None:
        change["policy"] = arguments.name
    if arguments.shadow is not None:
        change["shadow"] = None if arguments.shadow == "none" else arguments.shadow
    return change


def _explain(arguments: argparse.Namespace) -> int:
    from cluster.explain import explain

    return explain(arguments.request_id, arguments.file, arguments.json)


def _forget(arguments: argparse.Namespace) -> int:
    from cluster.forget import forget

    return forget(arguments.tenant, arguments.json)


def _kv_size(arguments: argparse.Namespace) -> int:
    from cluster.kv_size import Asked, kv_size

    each = (arguments.model, arguments.tokens, arguments.dtype, arguments.state_dtype)
    return kv_size(Asked(*each, ranks=arguments.tp, as_json=arguments.json))


def _calibrate(arguments: argparse.Namespace) -> int:
    if arguments.codecs is None:
        from cluster import curves

        return curves.calibrate(arguments.seconds, arguments.plot, arguments.json)
    from cluster.calibrate import calibrate

    given = {} if arguments.model is None else {"model": arguments.model}
    names = [CodecName(each) for each in arguments.codecs]
    return calibrate(load(arguments.config, given), names, arguments.json)


def _status(arguments: argparse.Namespace) -> int:
    from cluster.status import status

    return status(arguments.json)


def _drain(arguments: argparse.Namespace) -> int:
    from cluster.drain import drain

    return drain(arguments.seconds)


def _restart(arguments: argparse.Namespace) -> int:
    from cluster.restart import POOLS, restart

    unknown = sorted(set(arguments.pools) - set(POOLS))
    if unknown:
        raise ConfigError(f"restart {unknown[0]}", f"no pool; give {' or '.join(POOLS)}")
    return restart(arguments.pools or POOLS)


def _doctor(arguments: argparse.Namespace) -> int:
    from cluster.doctor import doctor

    return doctor(arguments.json)


def _down(arguments: argparse.Namespace) -> int:
    from cluster.down import down

    return down(arguments.json)
