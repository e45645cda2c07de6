"""An adapter and its base become small models: of a device, of all by vote, and of each class of hardware."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleetune import architectures, importances, sparsity, structures
from fleetune.architectures import Layout
from fleetune.coordinator.cli import main
from fleetune.coordinator.shrinkverb import folder_names
from fleetune.model.slim import layout_of_folder
from fleetune.structures import Structure
from support.child_client import ChildClient
from support.jobs import encoded, recipe_message

PI, JETSON = "Raspberry Pi 5", "Jetson Orin Nano"


@pytest.fixture(scope="module")
def host() -> Iterator[ChildClient]:
    with ChildClient("fleetune.coordinator.modelhost") as client:
        yield client


@dataclass(frozen=True)
class Exported:
    """A round's folder of three devices: one keeps low numbers, the other two, of one class, high ones."""

    folder: Path
    base: Path
    layout: Layout
    low: Structure
    high: Structure

    def kept(self, out: Path) -> tuple[int, ...]:
        return structures.from_json(self.layout, json.loads((out / "structure.json").read_text())).kept


def half(layout: Layout, sign: float) -> Structure:
    ranking = [[sign * unit for unit in range(group.units)] for group in layout.groups]
    return structures.choose(layout, structures.whole(layout), sparsity.keeps(layout, 0.5), ranking)


@pytest.fixture(scope="module")
def exported(host: ChildClient, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    layout = layout_of_folder(bert)
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    recipe = recipe_message("text-classification", architectures.target_names(layout), rank=4)
    fields = {"base": str(bert), "revision": "", "allow_hub": False, "recipe": encoded(recipe), "seed": 3, "init_adapter": None}
    host.ask("prepare", **fields, out_folder=str(folder))
    low, high = half(layout, -1.0), half(layout, 1.0)

    def device(name: str, hardware: str, structure: Structure, weight: int, **more: object) -> Mapping[str, object]:
        kept = structures.to_bytes(layout, structure).hex()
        return {"name": name, "hardware": hardware, "structure": kept, "sparsity": 0.5, "weight": weight, "rank": 4, **more}

    rising = importances.to_text([[float(unit) for unit in range(group.units)] for group in layout.groups])
    devices = [
        device("a", PI, low, 10),
        device("b", JETSON, low, 2, importance=rising),
        device("c", JETSON, high, 2, importance=rising),
    ]
    labels = list(recipe.labels)
    manifest = {"base": {"name": bert.name}, "task": {"kind": "text-classification", "labels": labels}, "devices": devices}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Exported(folder, bert, layout, low, high)


def asked(host: ChildClient, exported: Exported, out: Path, **more: object) -> Mapping[str, object]:
    fields = {"adapter_folder": str(exported.folder), "out_folder": str(out), "base": str(exported.base), "allow_hub": False}
    return host.ask("shrink", **fields, **more)


def test_a_class_s_devices_vote_among_themselves(host: ChildClient, exported: Exported, tmp_path: Path) -> None:
    for hardware, structure in (("", exported.low), (PI, exported.low), (JETSON, exported.high)):
        out = tmp_path / (hardware or "all")
        made = asked(host, exported, out, hardware=hardware)["result"]
        assert isinstance(made, dict)
        assert made["hardware"] == hardware
        assert exported.kept(out) == structure.kept, "of units with equal votes the more important ones stay"


def test_a_class_that_is_not_there_is_named_with_those_that_are(host: ChildClient, exported: Exported, tmp_path: Path) -> None:
    error = asked(host, exported, tmp_path / "none", hardware="Pi 9")["error"]
    assert isinstance(error, dict)
    assert f"no devices of class 'Pi 9'; it has '{JETSON}', '{PI}'" in error["message"]


def test_the_command_makes_a_model_for_each_class(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models"
    words = ["shrink", str(exported.folder), str(out), "--base", str(exported.base), "--offline", "--per-class", "--json"]
    assert main(words) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    assert [found["hardware"] for found in classes] == [JETSON, PI]
    assert sorted(path.name for path in out.iterdir()) == ["jetson-orin-nano", "raspberry-pi-5"]
    assert exported.kept(out / "jetson-orin-nano") == exported.high.kept
    assert all(found["sparsity"] == pytest.approx(0.5, abs=0.05) for found in classes)


def test_one_says_whose_model_is_wanted_in_one_way(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shrink", str(exported.folder), str(tmp_path / "out"), "--device", "a", "--per-class"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_importance_that_is_damaged_is_told(host: ChildClient, exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in exported.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["devices"][1]["importance"] = base64.b64encode(b"short").decode()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    wrong = Exported(folder, exported.base, exported.layout, exported.low, exported.high)
    error = asked(host, wrong, tmp_path / "out", hardware=JETSON)["error"]
    assert isinstance(error, dict)
    assert "importance of units is refused" in error["message"]


def test_every_class_has_a_folder_of_its_own() -> None:
    names = folder_names(["Pi 5", "pi-5", "GPU: NVIDIA", "???"])
    assert names == {"???": "unknown", "GPU: NVIDIA": "gpu-nvidia", "Pi 5": "pi-5", "pi-5": "pi-5-2"}
