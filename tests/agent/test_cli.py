"""The agent's command line, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleetune.agent import cli
from fleetune.agent.identity import StateInUseError
from fleetune.agent.session import RefusedError
from fleetune.errors import ConfigError, UnreachableError


def typed(tmp_path: Path, *words: str) -> Result:
    environment: dict[str, str | None] = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": None, "FLEETUNE_AGENT_CONFIG": None}
    return CliRunner().invoke(cli.cli, words, env=environment, standalone_mode=False)


@pytest.mark.parametrize("verb", ["run", "join", "check", "version", "completion"])
def test_every_verb_s_help_ends_with_examples_and_exit_codes(tmp_path: Path, verb: str) -> None:
    text = typed(tmp_path, verb, "--help").output
    assert f"  fleetune-agent {verb}" in text.partition("Examples:")[2]
    assert "0  done" in text.partition("Exit codes:")[2]


def test_check_prints_what_the_agent_would_report_and_changes_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    found = typed(tmp_path, "check", "--json", "--name", "bench", "--state-dir", str(tmp_path / "state"), "--data", f"intents={rows}")
    report = json.loads(found.output)
    assert (found.return_value, report["name"], report["data"], report["complaints"]) == (0, "bench", ["intents"], [])
    assert "echo" in report["methods"]
    assert not (tmp_path / "state").exists()


def test_check_names_a_missing_data_file(tmp_path: Path) -> None:
    found = typed(tmp_path, "check", "--data", "intents=nowhere.jsonl,also-nowhere.jsonl")
    assert found.return_value == 2
    assert "data.intents.train" in found.output
    assert "data.intents.validation" in found.output


@pytest.mark.parametrize("words", [["--data", "intents"], ["--data", "=a.jsonl"], ["--data", "a=b,c,d"], ["--set", "nonsense"]])
def test_options_that_make_no_sense_are_usage_errors(tmp_path: Path, words: list[str]) -> None:
    found = typed(tmp_path, "check", *words)
    assert found.exception is not None
    assert words[1] in str(found.exception)


def test_a_wrong_setting_is_a_complaint_with_its_path(tmp_path: Path) -> None:
    found = typed(tmp_path, "check", "--set", "training.accelerator=gpu", "--coordinator", "nowhere")
    assert "training.accelerator" in str(found.exception)
    assert "HOST:PORT" in str(found.exception)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(tmp_path: Path, shell: str) -> None:
    found = typed(tmp_path, "completion", shell)
    assert "fleetune-agent" in found.output
    assert "_FLEETUNE_AGENT_COMPLETE" in found.output


def test_version_is_told_as_json_too(tmp_path: Path) -> None:
    assert set(json.loads(typed(tmp_path, "version", "--json").output)) == {"version", "python"}


def test_errors_have_the_documented_exit_codes() -> None:
    codes = [cli.exit_code(error) for error in (ConfigError("x"), UnreachableError("x"), RefusedError("x"), StateInUseError("x"))]
    assert codes == [2, 3, 4, 5]
