"""What a job names must be there before it is queued."""

from __future__ import annotations

from pathlib import Path

from fleetune.coordinator import jobfolders, jobspec

JOB = """
name = "job"
[model]
base = "{base}"
[task]
kind = "causal-lm"
[data]
name = "rows"
[lora]
init_adapter = "{adapter}"
[evaluation]
source = "heldout"
heldout = "{heldout}"
"""


def paths(base: str, adapter: str, heldout: str) -> list[str]:
    spec = jobspec.parse(JOB.format(base=base, adapter=adapter, heldout=heldout))
    return [complaint.path for complaint in jobfolders.complaints(spec, lambda job_id: job_id == "known")]


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    assert paths(f"{tmp_path}/model", f"{tmp_path}/adapter", f"{tmp_path}/rows.jsonl") == [
        "model.base",
        "lora.init_adapter",
        "evaluation.heldout",
    ]


def test_what_is_there_is_no_complaint(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}")
    assert paths(str(tmp_path), str(tmp_path), f"{tmp_path}/rows.jsonl") == []


def test_hub_ids_are_not_looked_up_and_jobs_are(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    assert paths("org/name", "known", f"{tmp_path}/rows.jsonl") == []
    assert paths("org/name", "unknown", f"{tmp_path}/rows.jsonl") == ["lora.init_adapter"]


def test_a_path_that_no_system_takes_is_missing(tmp_path: Path) -> None:
    assert paths("/" + "x" * 4000, "known", f"{tmp_path}") == ["model.base", "evaluation.heldout"]
