"""The benchmark of rounds runs against real daemons and checks their result; what it measures is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_two_agents_echo_exactly_and_all_figures_are_there(tmp_path: Path) -> None:
    out = tmp_path / "rounds.json"
    command = [sys.executable, str(ROOT / "bench" / "rounds.py"), "--agents", "2", "--mib", "1", "--rounds", "2", "--json", str(out)]
    ended = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=840, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    (point,) = json.loads(out.read_text(encoding="utf-8"))
    assert point["product"]["exact"] is True
    assert len(point["product"]["seconds"]) == 2
    # Each floor is measured before and after.
    assert {name: len(floor["seconds"]) for name, floor in point["floors"].items()} == {"net": 4, "durable": 4}
    figures = {name: value for name, value in point["product"].items() if name not in ("seconds", "exact")}
    assert figures.keys() >= {
        "median_s",
        "mib_per_s",
        "coordinator_cpu_s_per_round",
        "coordinator_anon_peak_bytes",
        "coordinator_peak_bytes",
        "agent_idle_bytes",
        "agent_peak_bytes",
        "child_peak_bytes",
        "loopback_bytes_per_round",
        "start_s",
    }
    assert all(value > 0 for name, value in figures.items() if name != "coordinator_cpu_s_per_round")
    targets = [verdict["target"] for verdict in point["verdicts"]]
    assert len(targets) == 5
    assert targets[0] == "round, median"
    # Nothing is left behind but what was asked for.
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.json"]
