"""A process that cannot go on ends, whatever its threads wait for."""

from __future__ import annotations

import subprocess
import sys

STUCK = """
import threading
from fleetune.coordinator import haste
haste.end_within({seconds}, 1)
if {stuck}:
    threading.Event().wait()
"""


def run(seconds: float, *, stuck: bool) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", STUCK.format(seconds=seconds, stuck=stuck)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_something_holds_up_ends_all_the_same_and_says_so() -> None:
    ended = run(0.01, stuck=True)
    assert ended.returncode == 1
    assert "something still waits" in ended.stderr


def test_a_process_that_ends_in_order_is_left_alone() -> None:
    ended = run(3600.0, stuck=False)
    assert (ended.returncode, ended.stderr) == (0, "")
