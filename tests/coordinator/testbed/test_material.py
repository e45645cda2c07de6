"""Rows dealt to devices by their shares, and the settings their agents get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleetune import tomltext
from fleetune.coordinator import jobspec
from fleetune.coordinator.testbed import material, testbedfile
from fleetune.errors import ConfigError

SPEC = '[data]\nsplit = "{split}"\n[[device]]\nkind = "pi4"\n[[device]]\nkind = "laptop"\nshare = 3\n'


def _source(folder: Path, rows: int = 40) -> Path:
    source = folder / "source"
    source.mkdir()
    for part in ("train", "validation", "test"):
        lines = [json.dumps({"text": f"{part} {number}", "label": "ab"[number % 2]}) for number in range(rows)]
        (source / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return source


def _texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_every_row_goes_to_exactly_one_device(tmp_path: Path, split: str) -> None:
    spec = testbedfile.parse(SPEC.format(split=split))
    dealt = material.lay_out(tmp_path, spec, _source(tmp_path))
    texts = [text for name in spec.names for text in _texts(tmp_path / "data" / name / "train.jsonl")]
    assert sorted(texts) == sorted(f"train {number}" for number in range(40))
    assert [one.rows for one in dealt] == [len(_texts(tmp_path / "data" / name / "train.jsonl")) for name in spec.names]


def test_a_device_of_three_shares_gets_three_times_the_rows(tmp_path: Path) -> None:
    dealt = material.lay_out(tmp_path, testbedfile.parse(SPEC.format(split="iid")), _source(tmp_path))
    assert [one.rows for one in dealt] == [11, 29]  # one each first, the rest by shares


def test_dealing_again_gives_the_same_rows(tmp_path: Path) -> None:
    spec, source = testbedfile.parse(SPEC.format(split="dirichlet")), _source(tmp_path)
    first = material.lay_out(tmp_path, spec, source)
    before = _texts(tmp_path / "data" / "pi4" / "train.jsonl")
    assert material.deal(tmp_path, spec, source) == first
    assert _texts(tmp_path / "data" / "pi4" / "train.jsonl") == before


def test_an_agents_settings_name_its_rows_by_where_the_file_lies(tmp_path: Path) -> None:
    material.lay_out(tmp_path, testbedfile.parse(SPEC.format(split="iid")), _source(tmp_path))
    file = material.config_file(tmp_path, "pi4")
    settings = tomltext.read(file)
    assert "coordinator" not in settings and "state_dir" not in settings
    data = tomltext.table(tomltext.table(settings["data"])["testbed"])  # type: ignore[index]
    assert data is not None
    assert (file.parent / str(data["train"])).resolve() == tmp_path / "data" / "pi4" / "train.jsonl"


def test_the_testbeds_own_job_is_valid_and_goes_on_without_half_of_the_devices(tmp_path: Path) -> None:
    spec = testbedfile.parse(testbedfile.DEFAULT)
    material.lay_out(tmp_path, spec, None)
    job = jobspec.parse(material.job(tmp_path, spec, tmp_path / "base" / "minilm"))
    assert job.devices.minimum == 3
    assert job.rounds.quorum == 0.5


def test_fewer_rows_than_devices_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 1 rows for 2 devices"):
        material.lay_out(tmp_path, testbedfile.parse(SPEC.format(split="iid")), _source(tmp_path, rows=1))
