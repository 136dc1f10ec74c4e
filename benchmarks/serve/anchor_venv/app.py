"""Ray Serve LLM's prefill/decode app on one machine, as its user guide builds it.

Runs in the anchor's own virtual environment and imports nothing of this project. Prints
`running` once Serve has every replica up, and ends on SIGTERM. What it serves comes as one JSON
document on standard input: `model` (a folder), `name`, `port`, `engine`, `prefill_engine`,
`decode_engine` (vLLM's options), `env` (of the engines), `transfer` (vLLM's kv_transfer_config),
`experimental` (Ray Serve LLM's), `folder` (Ray's temporary files), `object_store_bytes`.
"""

import json
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_pd_openai_app

# Ray counts cores and limits nothing; two engines take two bundles of two, two ingresses one each.
RAY_CPUS = 16


def llm_config(spec: dict[str, Any], pool: str) -> LLMConfig:
    """One pool of one replica."""
    return LLMConfig(
        model_loading_config={"model_id": spec["name"], "model_source": spec["model"]},
        # Without it Ray Serve LLM asks for a GPU.
        accelerator_config={"kind": "cpu"},
        engine_kwargs={
            **spec["engine"],
            **spec[f"{pool}_engine"],
            # A copy each: Ray Serve LLM writes an engine id into it.
            "kv_transfer_config": dict(spec["transfer"]),
        },
        deployment_config={"num_replicas": 1},
        runtime_env={"env_vars": spec["env"]},
        experimental_configs=dict(spec["experimental"]),
    )


def main() -> None:
    spec = json.load(sys.stdin)
    stop = threading.Event()
    ray.init(
        num_cpus=RAY_CPUS,
        include_dashboard=False,
        object_store_memory=spec["object_store_bytes"],
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=spec["folder"],
    )
    # Ray installs handlers of its own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    serve.start(http_options={"host": "127.0.0.1", "port": spec["port"]})
    pools = {f"{pool}_config": llm_config(spec, pool) for pool in ("prefill", "decode")}
    serve.run(build_pd_openai_app(pools), name="anchor", route_prefix="/")
    print("running", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
