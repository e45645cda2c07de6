"""The command line: help, exit codes, JSON, and what each verb asks of a coordinator."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from fleetune.coordinator import exitcodes
from fleetune.coordinator.cli import cli, main
from fleetune.coordinator.cliverbs import Verb, VerbGroup
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.v1 import control_pb2 as pb
from support import control_service, job_views
from support.control_service import Fleet

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def commands() -> dict[str, click.Command]:
    """Every verb by its words, those of verbs with verbs of their own included."""
    found: dict[str, click.Command] = dict(cli.commands)
    for name, command in cli.commands.items():
        if isinstance(command, click.Group):
            found.update({f"{name} {below}": inner for below, inner in command.commands.items()})
    return found


COMMANDS = commands()
VERBS = sorted(COMMANDS)

JOB = """\
name = "intents"
[model]
base = "sentence-transformers/all-MiniLM-L6-v2"
[task]
kind = "text-classification"
labels = ["on", "off"]
[data]
name = "intents"
"""

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def fleet() -> Fleet:
    view = job_views.in_training()
    return Fleet(jobs={view.job_id: view}, adapter=control_service.adapter_files())


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


async def run(fleet: Fleet, *words: str) -> int:
    """Runs a command line against a coordinator that serves `fleet`; the verb has a loop of its own, as in its own process."""
    async with control_service.serving(fleet) as address:
        return await asyncio.to_thread(main, ["--plaintext", "--coordinator", address, *words])


TESTBED = ("up", "status", "run", "chaos", "report", "down")


def test_every_expected_verb_is_there() -> None:
    expected = {"serve", "submit", "validate", "watch", "jobs", "devices", "cancel", "pause", "resume", "export", "logs", "report"}
    expected |= {"completion", "demo", "version", "health", "gc", "audit", "backup", "restore", "check", "plan", "shrink"}
    expected |= {"init", "token", "operators", "join", "ca"}
    expected |= {f"token {verb}" for verb in ("create", "list", "revoke")} | {"ca rotate"}
    expected |= {f"devices {verb}" for verb in ("revoke", "quarantine", "release")}
    expected |= {f"operators {verb}" for verb in ("list", "renew", "revoke")}
    expected |= {"testbed"} | {f"testbed {verb}" for verb in TESTBED}
    assert expected == set(VERBS)


OFFLINE = {"serve", "validate", "completion", "demo", "version", "backup", "restore", "check", "plan", "shrink"} | {
    *("init", "ca", "ca rotate", "testbed"),
    *(f"testbed {verb}" for verb in TESTBED),
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples_and_exit_codes(verb: str, capsys: Captured) -> None:
    assert main([*verb.split(), "--help"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert f"fleetune {verb}" in text.partition("Examples:")[2]
    assert "Exit codes:" in text
    assert "3 coordinator unreachable" in text or verb in OFFLINE


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_answers_can_answer_in_json(verb: str) -> None:
    command = COMMANDS[verb]
    options = {option for parameter in command.params for option in parameter.opts}
    only_verbs = isinstance(command, VerbGroup) and not command.invoke_without_command
    assert "--json" in options or only_verbs or verb in {"serve", "completion"}


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_every_verb_parse(verb: str) -> None:
    command = COMMANDS[verb]
    assert isinstance(command, Verb | VerbGroup)
    for example in command.examples:
        # What stands after a pipe or a redirection belongs to the shell.
        words = shlex.split(re.sub(r"[|<>] .*", "", example.partition("fleetune ")[2]))
        # A verb of a verb may show those beside it, too.
        spoken = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        COMMANDS[spoken].make_context(spoken, words[len(spoken.split()) :], parent=click.Context(cli))


def test_every_verb_says_what_it_does_in_one_line_of_the_overview() -> None:
    for verb, command in COMMANDS.items():
        assert not command.get_short_help_str(67).endswith("..."), verb


def test_help_imports_neither_grpc_nor_rich() -> None:
    script = """
import sys
from fleetune.coordinator.cli import main
main(["--help"])
print(sorted({"grpc", "rich", "pydantic", "numpy", "asyncio"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_the_table_of_exit_codes_in_the_docs_is_the_one_in_the_code() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {str(code.value): meaning for code, meaning in exitcodes.MEANINGS.items()}


def test_an_unknown_verb_is_a_usage_error(capsys: Captured) -> None:
    assert main(["frobnicate"]) == ExitCode.USAGE
    assert "frobnicate" in capsys.readouterr().err


def test_an_address_without_a_port_is_a_usage_error(capsys: Captured) -> None:
    assert main(["jobs", "--coordinator", "localhost"]) == ExitCode.USAGE
    assert "HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["jobs"], ["devices"], ["watch"], ["health"], ["report"], ["cancel", "last"], ["logs", "last"]])
def test_an_unreachable_coordinator_is_exit_code_3(words: list[str], capsys: Captured) -> None:
    address = control_service.dead_address()
    assert main([*words, "--plaintext", "--coordinator", address]) == ExitCode.UNREACHABLE
    assert f"no coordinator answers at {address}" in capsys.readouterr().err


def test_an_error_is_one_json_document_where_json_was_asked_for(capsys: Captured) -> None:
    assert main(["jobs", "--json", "--plaintext", "--coordinator", control_service.dead_address()]) == ExitCode.UNREACHABLE
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["exit_code"] == 3
    assert printed.err == ""


def test_a_valid_job_file_is_exit_code_0(job_file: Path, capsys: Captured) -> None:
    assert main(["validate", str(job_file)]) == ExitCode.OK
    assert "valid" in capsys.readouterr().out


def test_an_invalid_job_file_gives_every_complaint_and_exit_code_2(job_file: Path, capsys: Captured) -> None:
    job_file.write_text(JOB.replace('kind = "text-classification"', 'kind = "poetry"') + "[lora]\nrank = 0\nrnak = 3\n")
    assert main(["validate", str(job_file), "--json"]) == ExitCode.USAGE
    document = json.loads(capsys.readouterr().out)
    assert not document["valid"]
    assert {item["path"] for item in document["complaints"]} >= {"task.kind", "lora.rank", "lora.rnak"}
    assert main(["validate", str(job_file)]) == ExitCode.USAGE
    text = capsys.readouterr().err
    assert all(path in text for path in ("task.kind", "lora.rank", "lora.rnak"))
    assert "text-classification, causal-lm, seq2seq-lm" in text


def test_a_job_file_that_is_no_toml_names_the_line(job_file: Path, capsys: Captured) -> None:
    job_file.write_text('name = "x"\nrank = = 3\n')
    assert main(["validate", str(job_file)]) == ExitCode.USAGE
    assert "line 2" in capsys.readouterr().err


def test_a_missing_job_file_is_a_usage_error(tmp_path: Path, capsys: Captured) -> None:
    assert main(["submit", str(tmp_path / "none.toml")]) == ExitCode.USAGE
    assert "none.toml" in capsys.readouterr().err


def test_an_error_nobody_planned_for_is_exit_code_1_without_a_trace(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fleetune.coordinator.cli._read_job", broken)
    assert main(["validate", "job.toml"]) == ExitCode.INTERNAL
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in printed
    assert "Traceback" not in printed


def test_an_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("fleetune.coordinator.cli._read_job", interrupted)
    assert main(["validate", "job.toml"]) == ExitCode.INTERRUPTED


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == ExitCode.OK
    assert "_FLEETUNE_COMPLETE" in capsys.readouterr().out


async def test_audit_tells_who_asked_for_what(fleet: Fleet, capsys: Captured) -> None:
    fleet.audit = [
        pb.AuditEntry(sequence=1, unix_s=1.0, actor="ipv4:192.0.2.7:5", action="cancel", subject="7f3a", outcome="done", detail="late")
    ]
    assert await run(fleet, "audit") == ExitCode.OK
    text = capsys.readouterr().out
    assert all(word in text for word in ("ipv4:192.0.2.7:5", "cancel", "7f3a", "done", "late"))
    assert await run(fleet, "audit", "--json", "--limit", "1") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["entries"][0]["action"] == "cancel"


async def test_submit_prints_the_id_of_the_new_job(fleet: Fleet, job_file: Path, capsys: Captured) -> None:
    assert await run(fleet, "submit", str(job_file)) == ExitCode.OK
    assert "7f3a21c9" in capsys.readouterr().out
    assert fleet.submitted[0].job_toml == JOB


async def test_submit_replaces_settings_that_were_set(fleet: Fleet, job_file: Path) -> None:
    assert await run(fleet, "submit", str(job_file), "--set", "rounds.count=3", "--set", "name=trial") == ExitCode.OK
    assert "count = 3" in fleet.submitted[0].job_toml
    assert 'name = "trial"' in fleet.submitted[0].job_toml


async def test_complaints_of_the_coordinator_are_exit_code_2(fleet: Fleet, job_file: Path, capsys: Captured) -> None:
    fleet.complaints = [pb.Complaint(path="model.base", value='"/nowhere"', allowed="an existing folder", remedy="Correct the path.")]
    assert await run(fleet, "submit", str(job_file)) == ExitCode.USAGE
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (pb.JOB_STATE_COMPLETED, ExitCode.OK),
        (pb.JOB_STATE_FAILED, ExitCode.JOB_FAILED),
        (pb.JOB_STATE_CANCELLED, ExitCode.JOB_CANCELLED),
    ],
)
@pytest.mark.parametrize("words", [["watch"], ["watch", "--json"], ["submit", "--wait", "JOB"], ["submit", "--wait", "--json", "JOB"]])
async def test_the_exit_code_of_a_followed_job_says_how_it_ended(
    state: Any, code: ExitCode, words: list[str], fleet: Fleet, job_file: Path, capsys: Captured
) -> None:
    fleet.watched = [job_views.in_training(), job_views.job(state, message="so it was", ended_after_s=9)]
    assert await run(fleet, *(str(job_file) if word == "JOB" else word for word in words)) == code
    printed = capsys.readouterr().out
    if "--json" in words:
        documents = [json.loads(line) for line in printed.splitlines()] if words[0] == "watch" else [json.loads(printed)]
        assert documents[-1]["message"] == "so it was"
    else:
        assert "so it was" in printed


async def test_an_unknown_job_is_exit_code_4(fleet: Fleet, capsys: Captured) -> None:
    assert await run(fleet, "report", "nonesuch") == ExitCode.NOT_FOUND
    assert "nonesuch" in capsys.readouterr().err


async def test_a_refusal_is_exit_code_7(fleet: Fleet, capsys: Captured) -> None:
    fleet.jobs["7f3a21c9"].state = pb.JOB_STATE_COMPLETED
    assert await run(fleet, "pause", "last") == ExitCode.REFUSED
    assert "has ended" in capsys.readouterr().err


async def test_cancel_hands_the_reason_on(fleet: Fleet, capsys: Captured) -> None:
    assert await run(fleet, "cancel", "last", "--reason", "wrong data", "--json") == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["message"]) == ("cancelled", "wrong data")


async def test_gc_says_what_went_and_what_would_go(fleet: Fleet, capsys: Captured) -> None:
    assert await run(fleet, "gc") == ExitCode.OK
    assert capsys.readouterr().out == "nothing to clear away\n"
    fleet.garbage = pb.CollectGarbageResponse(blobs=3, blob_bytes=3 << 20, folders=2, folder_bytes=2048, rows=1)
    assert await run(fleet, "gc", "--dry-run") == ExitCode.OK
    expected = "would clear away 3 blobs (3.0 MiB), 2 round folders (2.0 KiB), 1 records of missing blobs: 3.0 MiB\n"
    assert capsys.readouterr().out == expected
    assert await run(fleet, "gc", "--json") == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["dry_run"], document["blobs"], document["spools"]) == (False, 3, 0)
    assert [request.dry_run for request in fleet.collected] == [False, True, False]


@pytest.mark.parametrize(
    ("words", "keep", "older_s"),
    [
        ([], 0, 0.0),
        (["--keep-rounds", "2"], 2, 0.0),
        (["--jobs-older-than", "30d"], 1, 30 * 86400.0),
        (["--keep-rounds", "2", "--jobs-older-than", "12h"], 2, 12 * 3600.0),
    ],
)
async def test_gc_trims_as_asked(fleet: Fleet, words: list[str], keep: int, older_s: float) -> None:
    assert await run(fleet, "gc", *words) == ExitCode.OK
    (request,) = fleet.collected
    assert (request.keep_rounds, request.jobs_older_than_s) == (keep, older_s)


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1.5h", "30 d", "1y", ""])
def test_an_age_that_is_none_is_a_usage_error(age: str, capsys: Captured) -> None:
    assert main(["gc", "--jobs-older-than", age]) == ExitCode.USAGE
    assert "such as 12h or 30d" in capsys.readouterr().err


async def test_jobs_and_devices_and_logs_are_tables(fleet: Fleet, capsys: Captured) -> None:
    fleet.devices = [pb.DeviceView(name="kitchen-pi", online=True), pb.DeviceView(name="garage-orin", last_seen_unix_s=1.0)]
    fleet.logs = [pb.LogLine(unix_s=1.0, device_name="kitchen-pi", round=2, text="loading 103 weights")]
    assert await run(fleet, "jobs") == ExitCode.OK
    assert await run(fleet, "devices") == ExitCode.OK
    assert await run(fleet, "logs", "last") == ExitCode.OK
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("intents", "4/10", "kitchen-pi", "offline", "loading 103 weights"))


async def test_of_many_jobs_the_newest_are_listed_and_it_is_said_that_there_are_more(fleet: Fleet, capsys: Captured) -> None:
    for number in range(4):
        view = job_views.job(pb.JOB_STATE_COMPLETED, ended_after_s=9)
        view.job_id = f"job-{number}"
        fleet.jobs[view.job_id] = view
    ids = list(fleet.jobs)
    for words, shown, hint in (
        (["--limit", "2"], ids[-2:], "the newest 2; --all lists the older ones, too\n"),
        (["--limit", str(len(ids))], ids, ""),
        (["--limit", "1", "--all"], ids, ""),
        ([], ids, ""),
    ):
        assert await run(fleet, "jobs", "--json", *words) == ExitCode.OK
        told = capsys.readouterr()
        assert [job["job_id"] for job in json.loads(told.out)["jobs"]] == shown
        assert told.err == hint


async def test_logs_of_an_unknown_device_are_exit_code_4(fleet: Fleet) -> None:
    assert await run(fleet, "logs", "last", "nobody") == ExitCode.NOT_FOUND


async def test_lists_in_json_are_one_document_each(fleet: Fleet, capsys: Captured) -> None:
    for verb in ("jobs", "devices"):
        assert await run(fleet, verb, "--json") == ExitCode.OK
        assert list(json.loads(capsys.readouterr().out)) == [verb]


async def test_export_writes_the_folder_and_says_so(fleet: Fleet, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "adapter"
    assert await run(fleet, "export", "last", str(target), "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["folder"] == str(target)
    assert (target / "adapter_model.safetensors").is_file()
    assert await run(fleet, "export", "last", str(target)) == ExitCode.USAGE


def test_export_of_best_and_a_round_at_once_is_a_usage_error() -> None:
    assert main(["export", "last", "x", "--best", "--round", "3"]) == ExitCode.USAGE


async def test_health_of_a_serving_coordinator_is_exit_code_0(fleet: Fleet, capsys: Captured) -> None:
    assert await run(fleet, "health", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["serving"] is True


def test_wrong_settings_of_serve_are_exit_code_2(tmp_path: Path, capsys: Captured) -> None:
    words = ["serve", "--state-dir", str(tmp_path), "--listen", "0.0.0.0:7433", "--plaintext", "--heartbeat-s", "soon"]
    assert main(words) == ExitCode.USAGE
    printed = capsys.readouterr().err
    assert "fleetune init" in printed
    assert "heartbeat_s" in printed
