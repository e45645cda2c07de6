"""A fleet's worth of sessions that lose their coordinator together: all of them come back, and stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AGENTS = 100

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_hundred_agents_that_lost_their_coordinator_are_all_back_and_stay(tmp_path: Path) -> None:
    out = tmp_path / "herd.json"
    command = [sys.executable, str(ROOT / "bench" / "herd.py"), "--agents", str(AGENTS), "--processes", "2"]
    command += ["--down-s", "1", "--watch-s", "6", "--json", str(out), "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    assert out.exists(), ended.stdout + ended.stderr

    outcome = json.loads(out.read_text(encoding="utf-8"))
    # How long it took is not looked at here; a machine may be busy.
    assert len(outcome["back_s"]) == AGENTS, ended.stdout
    assert (outcome["lost_again"], outcome["online"]) == (0, AGENTS), ended.stdout
    assert outcome["heartbeats"] >= AGENTS
