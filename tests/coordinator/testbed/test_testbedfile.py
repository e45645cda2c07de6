"""testbed.toml: what it makes, and that every mistake in it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.complaints import ComplaintsError
from fleetune.coordinator.testbed import testbedfile
from fleetune.coordinator.testbed.spec import KINDS, TestbedSpec

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


def _complaints(text: str) -> dict[str, str]:
    with pytest.raises(ComplaintsError) as caught:
        testbedfile.parse(text)
    return {complaint.path: complaint.sentence() for complaint in caught.value.complaints}


def test_devices_of_a_kind_are_numbered_and_take_the_figures_of_their_kind() -> None:
    spec = testbedfile.parse('[[device]]\nkind = "pi4"\ncount = 2\n[[device]]\nkind = "laptop"\n')
    assert spec.names == ("pi4-1", "pi4-2", "laptop")
    assert spec.device("pi4-2").up_mbit == KINDS["pi4"].up_mbit
    assert spec.device("laptop").memory_mib == KINDS["laptop"].memory_mib


def test_every_figure_of_a_kind_can_be_overridden() -> None:
    spec = testbedfile.parse(
        '[[device]]\nkind = "pi5"\nname = "attic"\ncpus = 0.25\nmemory_mib = 512\nup_mbit = 1\ndown_mbit = 2\nlatency_ms = 20\n'
        "disk_mib = 300\nshare = 3\n"
    )
    (device,) = spec.devices
    assert (device.name, device.kind, device.cpus, device.memory_mib) == ("attic", "pi5", 0.25, 512)
    assert (device.up_mbit, device.down_mbit, device.latency_ms, device.disk_mib, device.share) == (1, 2, 20, 300, 3)


def test_all_mistakes_are_told_at_once_each_with_its_path() -> None:
    found = _complaints(
        'name = "Kitchen!"\nseed = -1\ncolour = "red"\n[coordinator]\ncpu = 2\n[data]\nsplit = "dirchlet"\n'
        '[[device]]\nkind = "pi6"\n[[device]]\nkind = "pi4"\ncpus = 0\nmemory_mib = "much"\nup_mbit = nan\n'
    )
    assert set(found) == {
        "name", "seed", "colour", "coordinator.cpu", "data.split", "device[1].kind", "device[2].cpus", "device[2].memory_mib",
        "device[2].up_mbit",
    }  # fmt: skip
    assert "did you mean cpus?" in found["coordinator.cpu"]
    assert 'Did you mean "dirichlet"?' in found["data.split"]
    assert 'device[1].kind = "pi6"' in found["device[1].kind"]
    assert "a number from 0.05 to 256" in found["device[2].cpus"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", "device"),
        ("[[device]]\ncount = 2\n", "device[1].kind"),
        ('[[device]]\nkind = "pi4"\n[[device]]\nkind = "pi4"\n', "device.name"),
        ('[[device]]\nkind = "pi4"\nname = "coordinator"\n', "device[1].name"),
        ('[[device]]\nkind = "pi4"\nname = "a_b"\n', "device[1].name"),
        ('[[device]]\nkind = "pi4"\nname = "abcdefghijklmnopqrst"\ncount = 2\n', "device[1].name"),
        ("device = 3\n", "device"),
        ("coordinator = 3\n", "coordinator"),
        ("[[device]\n", ""),
    ],
)
def test_a_mistake_is_told_by_its_path(text: str, path: str) -> None:
    assert path in _complaints(text)


def test_a_testbed_survives_its_way_through_json() -> None:
    spec = testbedfile.parse(testbedfile.DEFAULT)
    assert TestbedSpec.of_plain(spec.plain()) == spec


def test_the_shipped_testbed_has_six_unequal_devices_and_one_that_is_too_small() -> None:
    spec = testbedfile.load(DEPLOY / "testbed.toml")
    assert len(spec.devices) == 7
    assert min(device.memory_mib for device in spec.devices) < 512
    assert [device.kind for device in testbedfile.parse(testbedfile.DEFAULT).devices] == [device.kind for device in spec.devices[:6]]
