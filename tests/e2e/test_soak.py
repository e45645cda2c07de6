"""A short soak: descriptors, threads and files of a fleet do not grow with its rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 60

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_rounds_leave_no_descriptor_thread_or_file_behind(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--rounds", str(ROUNDS), "--agents", "3"]
    ended = subprocess.run(
        [*command, "--json", str(out), "--folder", str(tmp_path)], capture_output=True, text=True, timeout=840, check=False
    )
    assert out.exists(), ended.stdout + ended.stderr

    outcome = json.loads(out.read_text(encoding="utf-8"))
    # Memory is judged by the long form: sixty rounds are over before the allocators have settled.
    assert outcome["leaks"] == [], ended.stdout
    assert set(outcome["samples"]) == {"coordinator", "agent 0", "agent 1", "agent 2"}
