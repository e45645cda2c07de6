"""`fleetune plan`: its output schemas and its exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.coordinator import planverb
from fleetune.coordinator.cli import main
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.planner.plan import SOLVER_NAMES

Captured = pytest.CaptureFixture[str]

ROOT = Path(__file__).resolve().parents[2]

FLEET: dict[str, Any] = {
    "resource": {"total": 2e7, "kind": "bit/s"},
    "blocks": [{"name": "layer.1", "payload_bits": 2e8}, {"name": "layer.0", "payload_bits": 2e8}],
    "devices": [
        {"name": "pi-1", "ready_seconds": [20, 25], "fits": [True, False], "bits_per_unit": 1.0, "max_share": None},
        {"name": "nano", "ready_seconds": [9, 11], "fits": [True, True], "bits_per_unit": 1.0, "max_share": 1.2e7},
        {"name": "orin", "ready_seconds": [3, 4], "fits": [True, True], "bits_per_unit": 1.0, "max_share": None},
    ],
}

JOB = """\
name = "intents"
[model]
base = "org/model"
[task]
kind = "text-classification"
labels = ["on", "off"]
[data]
name = "intents"
[training]
steps = 4
batch_size = 8
[rounds]
count = 5
"""

KEYS = ["solver", "feasible", "round_seconds", "assignments", "idle_devices", "uncovered_blocks", "certificate"]


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(FLEET))
    return path


def infeasible(fleet_file: Path) -> Path:
    fleet = json.loads(json.dumps(FLEET))
    for device in fleet["devices"]:
        device["fits"][1] = False
    fleet_file.write_text(json.dumps(fleet))
    return fleet_file


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_json_has_the_documented_schema(solver: str, fleet_file: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(fleet_file), "--solver", solver, "--json"]) == ExitCode.OK
    made = json.loads(capsys.readouterr().out)
    assert list(made) == KEYS
    assert (made["solver"], made["feasible"], made["uncovered_blocks"]) == (solver, True, [])
    assert [one["block"] for one in made["assignments"]] == ["layer.1", "layer.0"]
    assert list(made["assignments"][0]) == ["block", "device", "share", "ready_seconds", "finish_seconds"]
    assert made["round_seconds"] == max(one["finish_seconds"] for one in made["assignments"])
    assert made["certificate"]["lower_bound_seconds"] <= made["round_seconds"]


def test_what_cannot_be_covered_has_its_own_exit_code_and_the_best_cover(fleet_file: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(infeasible(fleet_file)), "--json"]) == ExitCode.INFEASIBLE
    made = json.loads(capsys.readouterr().out)
    assert (made["feasible"], made["uncovered_blocks"]) == (False, ["layer.0"])
    assert [one["block"] for one in made["assignments"]] == ["layer.1"]
    assert main(["plan", "--fleet", str(fleet_file)]) == ExitCode.INFEASIBLE
    assert "1 of 2 blocks cannot be covered (layer.0)" in capsys.readouterr().out


def test_what_is_not_understood_is_a_usage_error_with_the_path(fleet_file: Path, capsys: Captured) -> None:
    fleet_file.write_text(json.dumps(FLEET).replace("25]", "NaN]"))
    assert main(["plan", "--fleet", str(fleet_file)]) == ExitCode.USAGE
    assert "devices[0].ready_seconds[1] = nan" in capsys.readouterr().err
    assert main(["plan", "--fleet", str(fleet_file), "--json"]) == ExitCode.USAGE
    answer = json.loads(capsys.readouterr().out)
    assert answer["complaints"][0]["path"] == "devices[0].ready_seconds[1]"


@pytest.mark.parametrize("words", [["--solver", "best"], ["--seed", "-1"], ["--fleet"]])
def test_wrong_options_are_usage_errors(words: list[str], fleet_file: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(fleet_file), *words]) == ExitCode.USAGE
    assert capsys.readouterr().err


def test_a_fleet_is_needed(capsys: Captured) -> None:
    assert main(["plan"]) == ExitCode.USAGE
    assert "--fleet" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(tmp_path / "none.json")]) == ExitCode.USAGE
    assert "none.json" in capsys.readouterr().err


def test_a_fleet_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(FLEET).encode())))
    assert main(["plan", "--fleet", "-", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["feasible"]


def test_the_table_shows_shares_finishes_and_the_proof(fleet_file: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(fleet_file)]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "orin" in text
    assert "idle: 1 (pi-1)" in text
    assert "this one is optimal" in text


def test_explain_gives_a_reason_for_every_device(fleet_file: Path, capsys: Captured) -> None:
    assert main(["plan", "--fleet", str(fleet_file), "--explain", "--json"]) == ExitCode.OK
    made = json.loads(capsys.readouterr().out)
    assert list(made) == [*KEYS, "explanations"]
    assert {reason["name"] for reason in made["explanations"]} == {"pi-1", "nano", "orin"}
    assert main(["plan", "--fleet", str(fleet_file), "--explain"]) == ExitCode.OK
    assert "stays idle" in capsys.readouterr().out


def test_a_job_adds_predictions_of_other_methods(fleet_file: Path, tmp_path: Path, capsys: Captured) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    assert main(["plan", "--fleet", str(fleet_file), "--job", str(job), "--json"]) == ExitCode.OK
    made = json.loads(capsys.readouterr().out)
    assert list(made) == [*KEYS, "predictions"]
    assert [one["method"] for one in made["predictions"]] == ["deft", "best-single", "data-parallel", "data-parallel-fastest", "depth"]
    assert made["predictions"][0]["rows_per_round"] == 2 * 4 * 8
    assert made["predictions"][0]["rows"] == 5 * 4 * 8
    assert main(["plan", "--fleet", str(fleet_file), "--job", str(job)]) == ExitCode.OK
    assert "best single device" in capsys.readouterr().out


def test_a_job_file_that_is_wrong_is_a_usage_error(fleet_file: Path, tmp_path: Path, capsys: Captured) -> None:
    job = tmp_path / "job.toml"
    job.write_text("name = 1")
    assert main(["plan", "--fleet", str(fleet_file), "--job", str(job)]) == ExitCode.USAGE
    assert "the job file" in capsys.readouterr().err


def test_the_seed_decides_the_random_matching(fleet_file: Path, capsys: Captured) -> None:
    outputs: list[str] = []
    for seed in (1, 1):
        main(["plan", "--fleet", str(fleet_file), "--solver", "random-equal", "--seed", str(seed), "--json"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_verb_offers_the_planners_solvers() -> None:
    assert planverb.SOLVERS == SOLVER_NAMES


def test_help_loads_no_numerics() -> None:
    script = "import sys, fleetune.coordinator.cli as c; c.main(['plan', '--help']); "
    script += "print([name for name in ('numpy', 'scipy', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_example_of_the_docs_can_be_pasted(tmp_path: Path, capsys: Captured) -> None:
    page = (ROOT / "docs" / "planner.md").read_text()
    example = page.partition("```json\n")[2].partition("```")[0]
    path = tmp_path / "fleet.json"
    path.write_text(example)
    assert main(["plan", "--fleet", str(path), "--json"]) == ExitCode.OK
    made = json.loads(capsys.readouterr().out)
    shown = json.loads(page.partition("prints\n\n```json\n")[2].partition("```")[0])
    assert made.keys() == shown.keys()
    assert made["round_seconds"] == pytest.approx(shown["round_seconds"], rel=1e-6)
    assert [one["device"] for one in made["assignments"]] == [one["device"] for one in shown["assignments"]]
