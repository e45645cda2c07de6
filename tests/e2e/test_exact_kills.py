"""A coordinator that is killed at exact steps on its disk, and one whose disk fails: nothing told is lost, no bit of a result differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, str(ROOT / "bench" / "exact.py")]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def run(folder: Path, *options: str) -> dict[str, Any]:
    """What the bench measured; skips where it says that it cannot inject faults here."""
    out = folder / "exact.json"
    command = [*BENCH, *options, "--json", str(out), "--folder", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    if "strace is not installed" in ended.stderr or "strace cannot inject here" in ended.stderr:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert out.exists(), ended.stdout + ended.stderr
    outcome: dict[str, Any]
    (outcome,) = json.loads(out.read_text(encoding="utf-8"))
    assert outcome["violations"] == [], ended.stdout
    assert outcome["wrong_ends"] == [], ended.stdout
    assert (outcome["jobs"] > 0, outcome["differing"]) == (True, 0), ended.stdout
    assert outcome["receipts"] > 0
    return outcome


def test_kills_at_steps_from_the_start_to_the_second_round_lose_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "--steps", "--step", "4")

    assert outcome["faults"] >= 10
    assert len(outcome["points"]) >= 6


def test_kills_at_flushes_and_renames_as_the_system_sees_them_lose_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "--calls", "--names", "fdatasync,rename")

    assert {point.partition(" ")[0] for point in outcome["points"]} == {"fdatasync", "rename"}


def test_a_flush_that_fails_ends_the_coordinator_before_it_tells_anything_more(tmp_path: Path) -> None:
    assert run(tmp_path, "--flush-errors", "6")["faults"] == 6


def test_kills_during_fold_and_publication_change_no_bit(tmp_path: Path) -> None:
    outcome = run(tmp_path, "--folds", "6")

    assert outcome["faults"] == 6
    assert outcome["points"].get("while a round was folded", 0) > 0
