"""The power of the coordinator's disk is cut in the middle of a job: what devices were told is still there, and the job goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUTS = 3

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_power_cuts_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    out = tmp_path / "cuts.json"
    command = [sys.executable, str(ROOT / "bench" / "powercut.py"), "--cuts", str(CUTS), "--json", str(out), "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    if ended.returncode == 2:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert out.exists(), ended.stdout + ended.stderr

    (outcome,) = json.loads(out.read_text(encoding="utf-8"))
    assert outcome["violations"] == [], ended.stdout
    assert (outcome["faults"], outcome["differing"], outcome["wrong_ends"]) == (CUTS, 0, []), ended.stdout
    assert outcome["receipts"] > 0
