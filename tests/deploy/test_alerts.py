"""What the chart has for Prometheus and Grafana, without either's server."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import dashboards
from tests.deploy.chart import ALERTS, ROOT
from tests.deploy.conftest import Tool

TOKENS = "breakeven_prompt_tokens_total"


def test_rules_are_well_formed_and_each_fires_by_its_fault(tool: Tool) -> None:
    """Over hours of made-up series; none fires while all is well."""
    promtool = tool("prometheus", "promtool")
    for words in (["check", "rules", str(ALERTS)], ["test", "rules", "alerts_test.yaml"]):
        here = ROOT / "tests" / "deploy"
        done = subprocess.run([promtool, *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load((ROOT / "tests" / "deploy" / "alerts_test.yaml").read_text())
    said = json.dumps(tests)
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert said.count(rule["alert"]) >= 2


def test_clusters_are_kept_apart() -> None:
    """No aggregate of any rule or panel loses the labels that tell them apart, and each series of a
    panel is of those that are picked."""
    rules = [rule["expr"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]]
    panels = [query for _, _, query in dashboards.queries()]
    mixed = r"\b(?:sum|max|min|avg|count|group)\b(?!=| by \(namespace, ray_io_cluster\b)"
    assert [text for text in rules + panels if re.search(mixed, text)] == []
    of_any = r"(?:breakeven_|vllm:)\w+(?!\w)(?!\{ray_io_cluster=~\"\$cluster\")"
    assert [text for text in panels if re.search(of_any, text)] == []


def test_hits_are_what_no_engine_computed(tool: Tool, tmp_path: Path) -> None:
    """Each source's share is of all tokens, those computed among them, which are no hit."""
    [query] = (query for _, panel, query in dashboards.queries() if panel == "Hits")
    tokens = {"device": 20, "vault": 10, "computed": 70}
    one = 'namespace="a", ray_io_cluster="one"'
    shown = query.replace("$__rate_interval", "5m").replace(dashboards.VARIABLE, ".*")
    test = {
        "interval": "15s",
        "input_series": [
            {"series": f'{TOKENS}{{source="{source}", {one}, instance="{ingress}"}}',
             "values": f"0+{count}x40"}
            for source, count in tokens.items()
            for ingress in "ab"
        ],
        "promql_expr_test": [{
            # In which order it adds up is promtool's to choose.
            "expr": f"round({shown}, 0.001)",
            "eval_time": "10m",
            "exp_samples": [
                {"labels": f'{{source="device", {one}}}', "value": 0.2},
                {"labels": f'{{source="vault", {one}}}', "value": 0.1},
            ],
        }],
    }  # fmt: skip
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    words = [tool("prometheus", "promtool"), "test", "rules", str(tmp_path / "test.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_paragraph() -> None:
    """In the page that operators read."""
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert f"**{rule['alert']}**" in page


def test_dashboards_are_what_the_code_makes() -> None:
    """`make chart` writes them."""
    pytest.importorskip("grafana_foundation_sdk", reason="requirements/deploy.txt has it")
    for board in dashboards.BOARDS:
        path = dashboards.FOLDER / f"{board.uid}.json"
        assert path.read_text() == dashboards.rendered(board), "run `make chart`"
