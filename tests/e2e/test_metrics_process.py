"""A fleet of real processes, read by a real Prometheus: what boards say of themselves, and every query of the dashboard and the alerts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fleetune.coordinator.exitcodes import ExitCode
from support.fleet import Agent, Fleet, toml
from support.ports import HeldPort

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
JOB = toml({"name": "link", "method": {"name": "echo", "state_mib": 0.1}, "rounds": {"count": 3}, "devices": {"minimum": 2}})
WAIT_S = 180.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    options = ("--metrics-listen", "127.0.0.1:0", "--heartbeat-s", "0.5", "--lease-s", "60")
    with Fleet(tmp_path / "fleet", {"oak": Agent(), "elm": Agent()}, coordinator=options) as running:
        yield running


def address(fleet: Fleet) -> str:
    return (fleet.coordinator_state / "metrics_address").read_text().strip()


def told(fleet: Fleet) -> dict[tuple[str, str], float]:
    """Metric and device (or nothing) -> value."""
    with urllib.request.urlopen(f"http://{address(fleet)}/metrics", timeout=WAIT_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(sample.name, sample.labels.get("device", "")): sample.value for family in families for sample in family.samples}


def test_what_boards_say_of_themselves_is_told_for_each(fleet: Fleet) -> None:
    assert fleet.completed(JOB).rounds_committed == 3
    both = {("fleetune_device_cpu_ratio", name) for name in ("oak", "elm")}
    fleet.poll(lambda: both <= told(fleet).keys(), "heartbeats")
    fleet.poll(lambda: told(fleet)["fleetune_rounds_committed_total", ""] == 3, "three rounds")
    found = told(fleet)
    for name in ("oak", "elm"):
        assert found["fleetune_device_online", name] == 1
        assert 0 <= found["fleetune_device_cpu_ratio", name] <= 1
        assert found["fleetune_device_memory_total_bytes", name] >= found["fleetune_device_memory_available_bytes", name] > 0
        assert found["fleetune_device_agent_resident_memory_bytes", name] > 5e6
        assert found["fleetune_device_certificate_expiry_timestamp_seconds", name] > time.time()
        assert abs(found["fleetune_device_last_heard_timestamp_seconds", name] - time.time()) < WAIT_S
    assert found["process_resident_memory_bytes", ""] > 1e7
    fleet.stop("oak")
    fleet.poll(lambda: told(fleet)["fleetune_device_online", "oak"] == 0, "the device to be gone")
    where = address(fleet)
    assert fleet.stop_coordinator() == 0
    assert not (fleet.coordinator_state / "metrics_address").exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{where}/metrics", timeout=WAIT_S)


def test_a_taken_port_for_metrics_ends_serve_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve = [sys.executable, "-m", "fleetune.coordinator.cli", "serve", "--plaintext", "--listen", "127.0.0.1:0"]
        serve += ["--state-dir", str(tmp_path / "state"), "--metrics-listen", f"127.0.0.1:{taken.getsockname()[1]}"]
        done = subprocess.run(serve, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == ExitCode.MACHINE
    assert "--metrics-listen" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------- a real Prometheus


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package of that name)")
def test_a_real_prometheus_answers_every_query_of_the_dashboard_and_the_alerts(fleet: Fleet, tmp_path: Path) -> None:
    with watching(tmp_path, address(fleet)) as api:
        fleet.completed(JOB)
        until(api, 'up{job="fleetune"} == 1')
        until(api, 'fleetune_device_cpu_ratio{device="oak"}')
        until(api, "fleetune_rounds_committed_total == 3")
        until(api, 'rate(fleetune_scrapes_total{status="200"}[1m])')  # a second look at everything
        for where, query in queries():
            # Nothing is wrong and nothing is planned: alerts keep quiet, and some have no samples. All others have, though a look that came
            # late lets them be away until the next.
            if where in MAY_BE_EMPTY or where.startswith("Fleetune"):
                asked(api, query)
            else:
                until(api, query)
        firing = asked(api, 'ALERTS{alertstate="firing"}')
        assert firing == []


MAY_BE_EMPTY = {
    "Alerts", "Alerts firing", "Planned and taken", "Progress of open jobs", "Tasks of the open round", "Since something of a job moved",
    "Temperature of each device", "Links", "Round trips", "Tasks that failed or were refused", "job_id",
    # Increases and rates need two scrapes on both sides of what happens.
    "Seconds of a round", "Where a round's time goes", "Calls that did not",
    "fleetune:refused_calls:rate5m", "fleetune:round_duration_seconds:p95_1h",
}  # fmt: skip


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and what it asks, as Grafana fills in its variables."""
    for group in yaml.safe_load((DEPLOY / "prometheus/fleetune.rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/fleetune.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = re.sub(r"\$(?:instance|device|job_id)\b", ".*", target["expr"])
            yield panel["title"], expression.replace("$__rate_interval", "1m")


@contextmanager
def watching(folder: Path, target: str) -> Iterator[str]:
    """A Prometheus with our configuration, which looks every second; the address of its API."""
    settings = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    settings["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in settings["rule_files"]]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    with HeldPort() as port, (folder / "prometheus.log").open("w") as log:
        options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        process = subprocess.Popen(["prometheus", *options, f"--web.listen-address={port.address}"], stdout=log, stderr=log)
        try:
            yield f"http://{port.address}/api/v1/query"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(WAIT_S)
            finally:
                process.kill()


def asked(api: str, query: str) -> list[Any]:
    """Samples of a query. AssertionError for one that Prometheus does not understand."""
    request = urllib.request.Request(api, urllib.parse.urlencode({"query": query}).encode())
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error


def until(api: str, query: str) -> None:
    """Wait until the query has a sample."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            if asked(api, query):
                return
        except urllib.error.URLError:  # it does not listen yet
            pass
        time.sleep(0.2)
    raise AssertionError(f"no sample of {query}")
