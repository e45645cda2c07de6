"""The root is replaced beside a running fleet, and SIGHUP: read again, cut nobody, end where the terminal is gone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.coordinator import statelock
from fleetune.coordinator.exitcodes import ExitCode
from support.fleet import Agent, Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

READY_S = 180.0


def test_the_root_is_replaced_in_two_words_and_nobody_is_cut_off(tmp_path: Path) -> None:
    with Fleet(tmp_path, {"oak": Agent()}) as fleet:
        rotate = ("ca", "rotate", "--state-dir", str(fleet.coordinator_state), "--json")
        begun = fleet.cli(*rotate)
        assert begun.returncode == 0, begun.stderr
        told = json.loads(begun.stdout)
        assert told["coordinator_told"] and told["behind"] == ["agent oak", "operator tester"]
        # The device hears of it on its open stream, and goes over to a new certificate by itself.
        fleet.poll(lambda: "certificate renewed name=oak" in fleet.log_of("oak"), "oak to renew")
        fleet.poll(lambda: fleet.log_of("oak").count("connected coordinator=") == 2, "oak to be back")
        refused = fleet.cli(*rotate, "--finish")
        assert refused.returncode == ExitCode.REFUSED and "operator tester" in refused.stdout and "oak" not in refused.stdout
        assert fleet.cli("operators", "renew").returncode == 0
        ended = fleet.cli(*rotate, "--finish")
        assert ended.returncode == 0 and json.loads(ended.stdout)["coordinator_told"], ended.stderr
        assert json.loads(fleet.cli("devices", "--json").stdout)["devices"][0]["online"]
        log = fleet.log_of("coordinator")
        assert "cannot be used yet" not in log and "Traceback" not in log
        assert "disconnected" not in fleet.log_of("oak")


def test_a_signal_lets_the_files_be_read_again_and_ends_nothing(tmp_path: Path) -> None:
    with Fleet(tmp_path, {"oak": Agent()}) as fleet:
        assert statelock.reloading_owner(fleet.coordinator_state) == fleet.pid("coordinator")
        for count in (1, 2):
            os.kill(fleet.pid("coordinator"), signal.SIGHUP)
            fleet.poll(lambda count=count: fleet.log_of("coordinator").count("reloaded: ") == count, "the files to be read")  # type: ignore[misc]
        certificate = fleet.coordinator_state / "tls" / "server.pem"
        sound = certificate.read_bytes()
        certificate.write_bytes(b"damaged")
        os.kill(fleet.pid("coordinator"), signal.SIGHUP)
        fleet.poll(lambda: "cannot be used yet" in fleet.log_of("coordinator"), "the damage to be told")
        assert json.loads(fleet.cli("devices", "--json").stdout)["devices"][0]["online"]
        certificate.write_bytes(sound)
        assert fleet.log_of("oak").count("connected coordinator=") == 1
    assert statelock.reloading_owner(fleet.coordinator_state) is None


def test_without_tls_the_signal_ends_nothing_either(tmp_path: Path) -> None:
    with Fleet(tmp_path, {}, plaintext=True) as fleet:
        os.kill(fleet.pid("coordinator"), signal.SIGHUP)
        fleet.poll(lambda: "there are none" in fleet.log_of("coordinator"), "the signal to be heard")


def waited(reached: Callable[[], bool], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while not reached():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.02)


def test_a_coordinator_whose_terminal_is_closed_ends_in_order(tmp_path: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    serve = [sys.executable, "-m", "fleetune.coordinator.cli", "serve", "--plaintext", "--listen", "127.0.0.1:0", "--state-dir", str(state)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    ours, theirs = pty.openpty()
    with log.open("ab") as output:
        # A session of its own that takes the terminal as its own: what a login shell does for the programs that it starts.
        take = "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", take, *serve], stdin=theirs, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    os.close(theirs)
    try:
        waited(lambda: (state / "address").exists(), log)
        os.kill(process.pid, signal.SIGHUP)
        waited(lambda: "there are none" in log.read_text(), log)
        os.close(ours)
        ours = -1
        assert process.wait(READY_S) == 0, log.read_text()
    finally:
        if ours >= 0:
            os.close(ours)
        if process.poll() is None:
            process.kill()
            process.wait()
    told = log.read_text()
    assert "the terminal was closed" in told and "stopped" in told
    assert not (state / "address").exists()
