"""What the demo writes before it starts a process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.demo import material
from fleetune.coordinator.demo.material import DemoSettings, prepare
from fleetune.coordinator.faults import FolderInUseError
from fleetune.errors import ConfigError, UnsupportedError
from fleetune.tomltext import read as read_toml


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 32}')
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 30), ("validation", 9), ("test", 5)):
        rows = [{"text": f"{part} {number}", "label": ["off", "on"][number % 2]} for number in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_every_row_lands_with_exactly_one_agent(base: Path, data: Path, tmp_path: Path, how: str) -> None:
    made = prepare(DemoSettings(data=data, base=base, split=how), tmp_path / "work")
    for part in ("train", "validation"):
        dealt = [row["text"] for agent in made.agents for row in rows_of(agent.config.parent / f"{part}.jsonl")]
        assert sorted(dealt) == sorted(row["text"] for row in rows_of(data / f"{part}.jsonl"))
    assert sum(agent.rows for agent in made.agents) == 30


def test_the_shipped_data_make_a_valid_job(base: Path, tmp_path: Path) -> None:
    made = prepare(DemoSettings(base=base, rounds=3, seed=5), tmp_path / "work")
    spec = jobspec.parse(made.job_toml)
    assert spec.rounds.count == 3
    assert spec.devices.minimum == 3
    assert spec.evaluation.source == "heldout"
    assert len(spec.task.labels) == len(made.labels) >= 10
    assert Path(spec.evaluation.heldout).is_file()
    assert made.test_rows == len(rows_of(Path(spec.evaluation.heldout)))


def test_deft_sends_gradients_unless_steps_are_asked_for(base: Path, tmp_path: Path) -> None:
    settings = DemoSettings(base=base, method="deft", rounds=100, agents=4)
    spec = jobspec.parse(prepare(settings, tmp_path / "gradients").job_toml)
    assert (spec.method.payload, spec.training.steps, spec.evaluation.every) == ("gradients", 1, 10)
    spec = jobspec.parse(prepare(replace(settings, steps=6), tmp_path / "deltas").job_toml)
    assert (spec.method.payload, spec.training.steps, spec.evaluation.every) == ("deltas", 6, 1)
    spec = jobspec.parse(prepare(replace(settings, method="fedavg_lora"), tmp_path / "fedavg").job_toml)
    assert (spec.training.steps, spec.evaluation.every) == (material.STEPS, 1)


def test_an_agent_config_names_its_rows_and_the_local_base(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    material.write_agent_config(path, name='od"d', coordinator="127.0.0.1:9", base=base, cores=2)
    document = read_toml(path)
    assert document["name"] == 'od"d'
    assert document["data"] == {"demo": {"train": "train.jsonl", "validation": "validation.jsonl"}}
    assert document["models"] == {"base": str(base)}


def test_cores_are_shared_out_and_nobody_gets_none() -> None:
    assert [material.cores_for_each(agents, 8) for agents in (1, 3, 8, 32)] == [8, 2, 1, 1]


def test_a_folder_that_is_not_empty_is_left_alone(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderInUseError, match="--keep"):
        prepare(DemoSettings(data=data, base=base, keep=data), tmp_path / "work")
    assert len(list(data.iterdir())) == 3


def test_a_missing_base_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "BASE_PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedError, match="make setup"):
        material.find_base(None)


def test_a_base_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        material.find_base(tmp_path)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("train", '{"text": "a", "label": "on"}\n{"text": 3}\n', r"train\.jsonl:2 lacks"),
        ("validation", "{oops}\n", r"validation\.jsonl:1 is no JSON"),
        ("test", '{"text": "a", "label": "blink"}\n', "blink"),
        ("test", "", "no rows"),
        ("train", '{"text": "a", "label": "on"}\n{"text": "b", "label": "off"}\n', "2 rows for 3 agents"),
        ("validation", '["text", "label"]\n', "lacks a text"),
    ],
)
def test_wrong_rows_are_named_with_file_and_line(base: Path, data: Path, tmp_path: Path, part: str, text: str, message: str) -> None:
    (data / f"{part}.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        prepare(DemoSettings(data=data, base=base), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_folder_without_a_part_says_what_it_must_hold(base: Path, data: Path, tmp_path: Path) -> None:
    (data / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"train\.jsonl, validation\.jsonl and test\.jsonl"):
        prepare(DemoSettings(data=data, base=base), tmp_path / "work")


def test_a_label_list_that_is_no_array_of_names_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    for text in ('{"on": 1}', "[1, 2]", "[on"):
        (data / "labels.json").write_text(text)
        with pytest.raises(ConfigError, match=r"labels\.json is not a JSON array"):
            prepare(DemoSettings(data=data, base=base), tmp_path / "work")


def test_labels_in_numbers_need_their_names(base: Path, data: Path, tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        (data / f"{part}.jsonl").write_text("".join(json.dumps({"text": "a", "label": number % 2}) + "\n" for number in range(9)))
    with pytest.raises(ConfigError, match=r"labels\.json"):
        prepare(DemoSettings(data=data, base=base), tmp_path / "work")
    (data / "labels.json").write_text('["off", "on"]')
    assert prepare(DemoSettings(data=data, base=base), tmp_path / "work").labels == ("off", "on")
