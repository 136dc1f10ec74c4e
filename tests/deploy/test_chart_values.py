"""One source of truth: the chart's values, our configuration and what is rendered agree."""

import itertools
import json
import re

import jsonschema
import pytest
import yaml

from cluster.config import load
from scripts import chart
from tests.deploy.chart import CHART, ROOT, VALUES, of_kind, parsed, pods, serve_config

# Words that every chart has, and those that the comment of their section explains.
_PLAIN = (
    *("repository", "pullPolicy", "nodeSelector", "tolerations", "affinity", "priorityClassName"),
    *("annotations", "requests", "limits", "enabled", "count", "className", "host", "hostnames"),
    *("size", "rules", "podMonitors", "dashboards", "name", "monitoring"),
    *("namespaceSelector", "podSelector"),
)
MANIFESTS = {path.stem: parsed(path.read_text()) for path in sorted((ROOT / "k8s").glob("*.yaml"))}


def test_the_schema_of_values_is_that_of_the_code() -> None:
    """`make chart` writes it; a new key of ours is one that the chart takes."""
    assert json.loads(chart.SCHEMA.read_text()) == json.loads(json.dumps(chart.schema()))


def test_the_schema_defines_nothing_that_it_does_not_use() -> None:
    """Sections that the chart sets itself leave no definition behind."""
    made = chart.schema()
    used = re.findall(r'"#/\$defs/(\w+)"', json.dumps(made))
    assert set(made["$defs"]) == set(used)


@pytest.mark.parametrize("name", VALUES)
def test_values_that_come_along_are_valid(name: str) -> None:
    """By the schema, and their configuration by our own loader."""
    values = yaml.safe_load(VALUES[name].read_text())
    jsonschema.validate(values, chart.schema())
    load(None, {**values["config"], "host": "node", "ray": {"address": "auto"}})


@pytest.mark.parametrize("name", MANIFESTS)
def test_rendered_configuration_is_ours(name: str) -> None:
    """What Serve is handed is read by our own loader, key files and certificates apart."""
    [application] = serve_config(MANIFESTS[name])["applications"]
    assert application["import_path"] == "cluster.ray_service:build"
    config = load(None, application["args"])
    assert config.host == "node"
    assert config.ingress.port == 8000
    groups = pods(MANIFESTS[name])
    counts = {"prefill": config.prefill.replicas, "decode": config.decode.replicas}
    [service] = of_kind(MANIFESTS[name], "RayService")
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert f"breakeven_{group['groupName']}" in offered
        if group["groupName"] in counts:
            assert group["replicas"] == counts[group["groupName"]]
    assert ("vault" in groups) == (config.tiers.vault is not None)


def test_every_value_has_its_comment() -> None:
    """On the line above, where its name is first used, or above the section that it stands in."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    seen, bare = set(_PLAIN), []
    for before, line in itertools.pairwise(["", *lines]):
        key = re.match(r" *([a-zA-Z]+):", line)
        if key is not None and key[1] not in seen:
            seen.add(key[1])
            bare += [] if before.lstrip().startswith("#") else [key[1]]
    assert bare == []
