"""Agents of other versions in one fleet: older ones that do not know the newer words, newer ones that say more than is understood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.coordinator.history import reader
from support.fleet import Agent, Fleet, toml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

HELLO_FIELDS_OF_1_0 = 12

OLDER = f"""
from fleetune.wire import channel; channel.PROTOCOL_MINOR = 0
from fleetune.agent import daemon
present = daemon.Daemon._hello
async def hello(self):
    made = await present(self)
    for field in made.DESCRIPTOR.fields:
        if field.number > {HELLO_FIELDS_OF_1_0}:
            made.ClearField(field.name)
    return made
daemon.Daemon._hello = hello"""

NEWER = r"""
from fleetune.wire import channel; channel.PROTOCOL_MINOR = 9
from fleetune.agent import daemon
present, beat = daemon.Daemon._hello, daemon.Daemon._heartbeat
def more(message):
    message.MergeFromString(b"\xa2\x38\x03new")  # field 900, which nobody has heard of
    assert message.SerializeToString().count(b"\xa2\x38\x03new") == 1
    return message
async def hello(self):
    return more(await present(self))
async def heartbeat(self, sequence):
    return more(await beat(self, sequence))
daemon.Daemon._hello, daemon.Daemon._heartbeat = hello, heartbeat"""

JOB = toml(
    {"name": "mixed", "method": {"name": "echo", "state_mib": 0.1}, "rounds": {"count": 3, "quorum": 1.0}, "devices": {"minimum": 3}}
)


def test_older_and_newer_agents_of_the_same_protocol_work_together(tmp_path: Path) -> None:
    agents = {"present": Agent(), "older": Agent(prelude=OLDER), "newer": Agent(prelude=NEWER)}
    with Fleet(tmp_path, agents) as fleet:
        view = fleet.completed(JOB)

        assert [entry.updates_folded for entry in view.history] == [3, 3, 3]
        assert all("Traceback" not in fleet.log_of(name) for name in agents)
    assert reader.examine(fleet.coordinator_state) == []


def test_a_fleet_of_an_earlier_version_is_upgraded_one_by_one_within_a_job(tmp_path: Path) -> None:
    out = tmp_path / "upgrade.json"
    command = [sys.executable, str(ROOT / "bench" / "upgrade.py"), "--json", str(out), "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    if ended.returncode == 2:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert out.exists(), ended.stdout + ended.stderr

    outcome = json.loads(out.read_text(encoding="utf-8"))
    assert outcome["missed"] == [], ended.stdout
