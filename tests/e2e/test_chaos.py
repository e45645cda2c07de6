"""A short chaos run: kills in the middle of a job lose nothing, count nothing twice and change no bit of the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("mode", "agents", "faults"),
    [("--coordinator-kills", 3, 5), ("--agent-kills", 3, 5), ("--cuts", 2, 3), ("--mixed", 3, 6)],
    ids=lambda value: str(value),
)
def test_a_job_under_faults_ends_as_the_undisturbed_one(tmp_path: Path, mode: str, agents: int, faults: int) -> None:
    out = tmp_path / "chaos.json"
    command = [sys.executable, str(ROOT / "bench" / "chaos.py"), mode, str(faults), "--agents", str(agents), "--cut-mib", "8"]
    ended = subprocess.run(
        [*command, "--json", str(out), "--folder", str(tmp_path)], capture_output=True, text=True, timeout=840, check=False
    )
    assert out.exists(), ended.stdout + ended.stderr

    (outcome,) = json.loads(out.read_text(encoding="utf-8"))
    assert outcome["violations"] == [], ended.stdout
    assert (outcome["completed"], outcome["identical"], outcome["faults"]) == (True, True, faults), ended.stdout
    assert outcome["receipts"] > 0
    # How long things took is not looked at; a machine may be busy. Bytes do not depend on that.
    assert all(size <= 2 << 20 for size in outcome["resent_bytes"]), ended.stdout
    # Nothing is left behind but what was asked for.
    assert [path.name for path in tmp_path.iterdir()] == ["chaos.json"]
