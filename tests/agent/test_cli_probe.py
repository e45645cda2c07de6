"""`fleetune-agent probe` and `doctor`, as typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from fleetune.agent import cli, cli_probe, config
from fleetune.agent.doctor import reading
from fleetune.agent.doctor.facts import Facts, Torch
from fleetune.agent.probe.linkfigures import LinkFigures
from support.tiny_models import tiny_classifier

BROKEN = Facts(board_name="Raspberry Pi 4 Model B", torch=Torch("2.10.0+cpu"))


def typed(tmp_path: Path, *words: str) -> Result:
    environment: dict[str, str | None] = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": None, "FLEETUNE_AGENT_CONFIG": None}
    return CliRunner().invoke(cli.cli, [*words, "--state-dir", str(tmp_path / "state")], env=environment, standalone_mode=False)


@pytest.mark.parametrize("verb", ["probe", "doctor"])
def test_help_ends_with_examples_and_exit_codes(verb: str) -> None:
    text = CliRunner().invoke(cli.cli, [verb, "--help"]).output
    assert f"  fleetune-agent {verb}" in text.partition("Examples:")[2]
    assert "0  done" in text.partition("Exit codes:")[2]


def test_the_doctor_s_exit_code_is_the_documented_one() -> None:
    assert cli_probe.PROBLEMS_CODE == cli.ExitCode.PROBLEMS


def test_the_doctor_prints_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "facts", lambda state_dir: BROKEN)
    found = typed(tmp_path, "doctor")
    assert found.return_value == cli.ExitCode.PROBLEMS
    assert "illegal instruction" in found.output
    assert "-> pip install --force-reinstall 'torch>=2.6,<2.10'" in found.output


def test_the_doctor_s_json_has_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "facts", lambda state_dir: Facts(torch=Torch("2.9.1")))
    found = typed(tmp_path, "doctor", "--json")
    report = json.loads(found.stdout)
    assert (found.return_value, report["level"]) == (0, "fine")
    assert {one["check"] for one in report["findings"]} >= {"torch", "clock", "disk", "python", "throttling", "swap", "board"}


def test_a_probe_is_kept_and_shown_again_with_its_age(tmp_path: Path) -> None:
    base = tiny_classifier(tmp_path / "base")
    words = ["probe", "--base", str(base), "--batch-rows", "2", "--max-length", "16", "--cores", "1"]
    first = json.loads(typed(tmp_path, *words, "--json").stdout)
    second = typed(tmp_path, *words)
    assert first["source"] == "measured"
    assert first["answer"]["model"]["tokens_per_row"] == 16
    assert second.return_value == 0
    assert "layer.1" in second.output
    assert len(list((tmp_path / "state" / "figures").iterdir())) == 1
    # The same figures, not measured a second time.
    assert json.loads(typed(tmp_path, *words, "--json").stdout)["measured_unix_s"] == first["measured_unix_s"]


def test_the_link_is_shown_with_its_age_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_unix_s = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now_unix_s)
    known = LinkFigures(tmp_path / "figures", "coordinator:7433", clock=lambda: now_unix_s - 4)
    known.sent(1 << 20, 1.0)
    known.answered(0.02)
    document = known.due()
    assert document is not None
    known.write(document)
    loaded = config.load(None, {}, {"state_dir": str(tmp_path), "link.down_mbps": "20"}, home=tmp_path)
    link = cli_probe.link_report(loaded)
    assert link is not None
    assert cli_probe.link_words(link) == "up 8.4 Mbit/s (measured, 4 s old), down 20.0 Mbit/s (configured), round trip 20 ms"


def test_without_an_agent_that_ran_no_link_is_known(tmp_path: Path) -> None:
    assert cli_probe.link_report(config.load(None, {}, {"state_dir": str(tmp_path)}, home=tmp_path)) is None


def test_a_depth_that_the_model_lacks_is_no_crash(tmp_path: Path) -> None:
    found = typed(
        tmp_path, "probe", "--base", str(tiny_classifier(tmp_path / "base")), "--depth", "99", "--cores", "1", "--max-length", "8"
    )
    assert found.exception is not None
    assert "depth" in str(found.exception).lower()


def test_ctrl_c_ends_the_child_and_leaves_no_traceback(tmp_path: Path) -> None:
    # Whoever runs the tests in the background of a script has SIGINT ignored, and children inherit that.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fleetune.agent.cli import main; main()"
    program = [sys.executable, "-c", start, "probe", "--cores", "1", "--state-dir", str(tmp_path)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    probe = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    me = psutil.Process(probe.pid)
    while not (children := me.children()):
        assert probe.poll() is None
    probe.send_signal(signal.SIGINT)
    out, err = probe.communicate(timeout=60)
    assert (probe.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert not any(child.is_running() for child in children)
