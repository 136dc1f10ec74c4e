"""The cluster as KubeRay deploys it: Serve builds it from `serveConfigV2`, and no `serve` runs.

Its `args` are the sections of the configuration. Where things run is told by the resources that
each group's pods have (helm/breakeven). Kubernetes starts and replaces pods, Serve what is in them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ray.serve import Application

from cluster import app, launch
from cluster.config import cluster_key, load

# Of each pod alone.
_SCRATCH = Path("/tmp/breakeven")
_DEPLOYMENTS = ("ingress", "catalogue", "prefill", "decode", "vault")


def build(sections: dict[str, Any]) -> Application:
    """The application of this configuration: another one replaces every replica, the same none.

    Raises `ConfigError`, which Serve shows as the reason that the application failed.
    """
    config = load(None, sections)
    secret, model = cluster_key(), launch.find_model(config)
    told = json.dumps(sections, sort_keys=True).encode() + secret
    versions = dict.fromkeys(_DEPLOYMENTS, hashlib.sha256(told).hexdigest()[:16])
    return app.build(config, model, _SCRATCH, secret, versions, {})
