"""The systemd units as systemd itself reads them, and what it thinks of their walls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from fleetune.agent.cli import ExitCode as AgentExit
from fleetune.coordinator.exitcodes import ExitCode as CoordinatorExit

SYSTEMD = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
ROLES = ("agent", "coordinator")
BOARDS = ("", "raspberry", "nvidia", "jetson")

ANALYZE = shutil.which("systemd-analyze")
VERSION = 0
if ANALYZE is not None:
    told = re.search(r"systemd (\d+)", subprocess.run([ANALYZE, "--version"], capture_output=True, text=True, check=False).stdout)
    VERSION = int(told[1]) if told else 0

needs_systemd = pytest.mark.skipif(VERSION < 250, reason="systemd-analyze is not here, or older than 250")

EXPOSURE_MAX = {
    ("coordinator", ""): 1.4,
    ("agent", ""): 1.4,
    ("agent", "raspberry"): 1.6,
    ("agent", "nvidia"): 1.8,
    ("agent", "jetson"): 1.8,
}
"""As docs/edge-install.md says, of 10; what may grow here has to be explained there."""


def laid_out(folder: Path, role: str, board: str = "") -> Path:
    """The unit with its drop-ins, as the installer lays them out, and programs that are there."""
    program = folder / "opt" / ("fleetune-agent" if role == "agent" else "fleetune")
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = folder / f"fleetune-{role}.service"
    text = (SYSTEMD / unit.name).read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/fleetune/current/bin/", f"{program.parent}/"), encoding="utf-8")
    beside = folder / f"{unit.name}.d"
    beside.mkdir()
    for number, name in enumerate(
        [f"board-{board}"] * bool(board) + ["memory"] + ["restart-backoff"] * (VERSION >= 254),
    ):
        shutil.copy(SYSTEMD / "drop-in" / f"{name}.conf", beside / f"{number}0.conf")
    return unit


def analyze(*words: str, unit: Path) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{unit.parent}:/lib/systemd/system", "SYSTEMD_COLORS": "0"}
    return subprocess.run([ANALYZE, *words, str(unit)], capture_output=True, text=True, check=False, env=environment)


CASES = [("coordinator", ""), *(("agent", board) for board in BOARDS)]


@needs_systemd
@pytest.mark.parametrize(("role", "board"), CASES)
def test_systemd_reads_every_line_of_a_unit(tmp_path: Path, role: str, board: str) -> None:
    # An unknown key is only a warning to it; here it is none too many.
    done = analyze("verify", "--man=no", unit=laid_out(tmp_path, role, board))
    ours = [line for line in done.stderr.splitlines() if "fleetune" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@needs_systemd
@pytest.mark.parametrize(("role", "board"), CASES)
def test_the_exposure_is_no_more_than_the_docs_say(tmp_path: Path, role: str, board: str) -> None:
    # Each version weighs a little otherwise; the figures are those of 252.
    most = EXPOSURE_MAX[role, board] + (0.0 if VERSION == 252 else 0.5)
    done = analyze("security", "--offline=yes", "--no-pager", f"--threshold={round(most * 10)}", unit=laid_out(tmp_path, role, board))
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if line.startswith(("✗", "→")))


@needs_systemd
def test_the_drop_in_of_a_board_is_read(tmp_path: Path) -> None:
    # Else the two tests above would look at the bare unit alone.
    done = analyze("security", "--offline=yes", "--no-pager", unit=laid_out(tmp_path, "agent", "raspberry"))
    assert re.search(r"^✗ PrivateDevices=", done.stdout, re.MULTILINE)


def keys(file: Path) -> dict[str, str]:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys as they are written
    parser.read_string(file.read_text(encoding="utf-8"))
    return {key: value for section in parser.sections() for key, value in parser[section].items()}


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_is_watched_and_started_again_but_not_after_wrong_settings(role: str) -> None:
    unit = keys(SYSTEMD / f"fleetune-{role}.service")
    assert (unit["Type"], unit["NotifyAccess"], unit["Restart"]) == ("notify", "main", "on-failure")
    assert int(unit["WatchdogSec"]) > 0
    assert unit["RestartPreventExitStatus"] == str(int(AgentExit.USAGE if role == "agent" else CoordinatorExit.USAGE))


@pytest.mark.parametrize("role", ROLES)
def test_a_child_without_memory_does_not_take_the_daemon_with_it(role: str) -> None:
    assert keys(SYSTEMD / f"fleetune-{role}.service")["OOMPolicy"] == "continue"


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_logs_json_and_keeps_its_state_to_itself(role: str) -> None:
    unit = keys(SYSTEMD / f"fleetune-{role}.service")
    assert unit["ExecStart"].endswith("--log-format json")
    assert unit["StateDirectory"] == unit["User"] and unit["StateDirectoryMode"] == "0700"
