"""testbed.json: what one verb leaves for the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator.faults import MachineError, NotFoundError
from fleetune.coordinator.testbed import statefile, testbedfile
from fleetune.coordinator.testbed.backend import Place
from fleetune.coordinator.testbed.statefile import Kept


def _kept(folder: Path) -> Kept:
    place = Place(testbedfile.parse(testbedfile.DEFAULT), folder, "ft123456", folder / "base" / "minilm", {"image": "fleetune:test"})
    return Kept("netns", place, 1234.5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    statefile.write(_kept(tmp_path))
    assert statefile.read(tmp_path) == _kept(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [statefile.FILE]


def test_a_folder_without_a_testbed_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no testbed in"):
        statefile.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 1, "base": null, "spec": {}}'])
def test_a_damaged_file_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / statefile.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(MachineError, match=r"testbed\.json"):
        statefile.read(tmp_path)


def test_prefixes_are_short_enough_for_names_of_namespaces_and_of_containers() -> None:
    prefix = statefile.new_prefix()
    assert prefix.isalnum() and prefix.islower() and len(prefix) <= 10
