"""The reference pages are those that the tables in the code give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fleetune.coordinator import jobdocs

ROOT = Path(__file__).resolve().parents[1]


def test_the_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_field_of_a_job_is_explained() -> None:
    rows = list(jobdocs.fields())
    assert len(rows) > 50
    assert all(row.help.endswith(".") and row.takes and row.default for row in rows)
    assert len({row.path for row in rows}) == len(rows)


def test_every_duration_and_size_has_a_unit() -> None:
    assert all(row.unit for row in jobdocs.fields() if re.search(r"_(s|mib|steps|rows|length)$", row.path))
