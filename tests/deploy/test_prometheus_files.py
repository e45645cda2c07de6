"""Alerts and the dashboard ask only for what a coordinator tells, in a language that Prometheus' own tool reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import scraping
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus/fleetune.rules.yml"
DASHBOARD = DEPLOY / "grafana/dashboards/fleetune.json"

# Of Prometheus itself.
ITS_OWN = {"up", "ALERTS"}
_METRIC = re.compile(r"\b(?:fleetune|process|python)_[a-z_]+\b|\bfleetune:[a-z0-9_:]+\b|\b(?:up|ALERTS)\b")
_BY_LABELS = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package: prometheus)")


def promtool(*arguments: str, text: str = "") -> tuple[int, str]:
    """Its exit code, and all that it says."""
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and what it asks; of the dashboard, as Grafana fills in its variables."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    asked += [(note["name"], note["expr"]) for note in dashboard["annotations"]["list"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), *(\w+)\)", variable["query"]["query"])
            assert found is not None, variable
            asked.append((variable["name"], f"group by ({found[2]}) ({found[1]})"))
    for where, expression in asked:
        yield where, re.sub(r"\$(?:instance|device|job_id)\b", ".*", expression).replace("$__rate_interval", "1m")


def asked_metrics(expression: str) -> set[str]:
    outside = re.sub(r'"[^"]*"', '""', expression)  # label values are no metrics
    return set(_METRIC.findall(outside)) - ITS_OWN


@pytest.fixture(scope="module")
def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


async def test_every_query_asks_for_metrics_and_labels_of_a_real_scrape(tmp_path: Path, recorded: set[str]) -> None:
    async with coordinating(tmp_path, metrics_listen="127.0.0.1:0") as coordinator, EchoAgent(coordinator.address, "oak") as oak:
        oak.serve()
        await coordinator.ended(await coordinator.submit(echo_job()))
        assert coordinator.running.metrics is not None
        found = await scraping.scrape(coordinator.running.metrics.port)
    told: set[str] = set()
    for family in found.families.values():
        told |= {family.name, *(sample.name for sample in family.samples)}
        told |= {f"{family.name}_total"} if family.type == "counter" else set()
    assert [(where, name) for where, expression in queries() for name in asked_metrics(expression) - told - recorded] == []


def test_every_query_names_only_labels_that_the_metric_has() -> None:
    from fleetune.coordinator.metrics.catalog import BY_NAME

    of_prometheus = {"job", "instance"}
    wrong: list[tuple[str, str, str]] = []
    for where, expression in queries():
        grouped = {label.strip() for labels in _BY_LABELS.findall(expression) for label in labels.split(",") if label.strip()}
        for name, selector in _SELECTOR.findall(expression):
            base = re.sub(r"_(?:bucket|sum|count)$", "", name)
            row = BY_NAME.get(name) or BY_NAME.get(base)
            if row is None:
                continue
            has = {*row.labels, *of_prometheus, "le" if row.kind == "histogram" else ""}
            wrong += [(where, name, label) for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector) if label not in has]
        every = {label for name in asked_metrics(expression) for label in _labels(name)} | of_prometheus | {"le", "code"}
        wrong += [(where, expression, label) for label in grouped - every]
    assert wrong == []


def _labels(name: str) -> tuple[str, ...]:
    from fleetune.coordinator.metrics.catalog import BY_NAME

    row = BY_NAME.get(name) or BY_NAME.get(re.sub(r"_(?:bucket|sum|count)$", "", name))
    return row.labels if row is not None else ()


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    from fleetune.coordinator.metrics.catalog import CATALOG

    asked = {re.sub(r"_(?:bucket|sum|count)$", "", name) for _, expression in queries() for name in asked_metrics(expression)}
    # What is there to be looked at by hand, or told by a sum.
    left_out = {
        "fleetune_epoch",
        "fleetune_devices_revoked",
        "fleetune_device_busy",
        "fleetune_device_memory_total_bytes",
    }
    assert {row.name for row in CATALOG} - asked == left_out


@needs_promtool
def test_promtool_reads_every_query(tmp_path: Path) -> None:
    file = tmp_path / "queries.yml"
    asked = [{"record": f"query:{number}", "expr": expression} for number, (_, expression) in enumerate(queries())]
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": asked}]}))
    code, said = promtool("check", "rules", str(file))
    assert code == 0, said
    assert f"{len(asked)} rules found" in said


@needs_promtool
async def test_promtool_has_nothing_against_a_real_scrape(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen="127.0.0.1:0") as coordinator, EchoAgent(coordinator.address, "oak"):
        assert coordinator.running.metrics is not None
        answer = await scraping.ask(coordinator.running.metrics.port)
    assert promtool("check", "metrics", text=answer.text) == (0, "")


@needs_promtool
def test_configuration_rules_and_the_alerts_own_tests_hold() -> None:
    done = subprocess.run([str(DEPLOY / "prometheus/check.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_every_alert_has_a_test_a_severity_and_a_remedy() -> None:
    tested = (DEPLOY / "prometheus/tests/fleetune.rules.test.yml").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) > 10
    for rule in alerts:
        assert re.search(rf"alertname: {rule['alert']}\n\s+exp_alerts:", tested), f"{rule['alert']} is never seen to fire"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["remedy"]


# ---------------------------------------------------------------------------------------------------------------- Grafana


def test_panels_have_numbers_of_their_own_places_that_do_not_overlap_and_the_chosen_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    every = dashboard["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_legends_name_only_labels_that_the_query_leaves() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            grouped = [{label.strip() for label in found.split(",")} for found in re.findall(r"\bby \(([^)]*)\)", target["expr"])]
            left = grouped[0] if grouped else {label for name in asked_metrics(target["expr"]) for label in _labels(name)}
            assert named <= left, (panel["title"], target["legendFormat"])


def test_the_provisioning_finds_the_dashboard_and_names_its_source() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/fleetune.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/fleetune.yml").read_text())["providers"]
    assert source["type"] == "prometheus" and source["url"] == "${PROMETHEUS_URL}"
    assert provider["type"] == "file" and provider["options"]["path"]
