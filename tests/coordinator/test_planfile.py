"""Fleet files: what is read, and the complaint about everything that is not."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator import planfile
from fleetune.coordinator.planfile import FleetFileError
from fleetune.errors import ConfigError

FLEET: dict[str, Any] = {
    "resource": {"total": 2e7, "kind": "bit/s"},
    "blocks": [{"name": "layer.1", "payload_bits": 786432}, {"name": "layer.0", "payload_bits": 786432, "rounds_since_trained": 2}],
    "devices": [
        {"name": "pi-1", "ready_seconds": [1.5, 2], "fits": [True, False], "bits_per_unit": 1.0, "max_share": None},
        {"name": "orin", "ready_seconds": [0.5, 0.6], "fits": [True, True], "bits_per_unit": 1.0, "max_share": 1e6, "snr_hz": 3e6},
    ],
}

Change = Callable[[dict[str, Any]], object]


def written(change: Change | None = None) -> bytes:
    fleet = copy.deepcopy(FLEET)
    if change is not None:
        change(fleet)
    return json.dumps(fleet).encode()


def complaints(content: bytes) -> dict[str, str]:
    with pytest.raises(FleetFileError) as caught:
        planfile.parse(content)
    assert all(item.remedy for item in caught.value.complaints)
    return {item.path: item.sentence() for item in caught.value.complaints}


def test_a_fleet_file_is_read() -> None:
    fleet = planfile.parse(written())
    assert fleet.blocks == ("layer.1", "layer.0")
    assert fleet.devices == ("pi-1", "orin")
    assert fleet.ready_s.tolist() == [[1.5, 2.0], [0.5, 0.6]]
    assert fleet.fits.tolist() == [[True, False], [True, True]]
    assert fleet.max_share.tolist() == [math.inf, 1e6]
    assert np.isnan(fleet.snr_hz[0])
    assert fleet.snr_hz[1] == 3e6
    assert fleet.rounds_since_trained.tolist() == [0.0, 2.0]
    assert (fleet.total, fleet.kind) == (2e7, "bit/s")


def test_empty_fleets_are_read() -> None:
    fleet = planfile.parse(written(lambda fleet: fleet.update(devices=[])))
    assert fleet.ready_s.shape == (0, 2)
    fleet = planfile.parse(b'{"resource": {"total": 1, "kind": "airtime"}, "blocks": [], "devices": []}')
    assert fleet.ready_s.shape == (0, 0)


def test_a_radio_needs_no_bits_per_unit() -> None:
    fleet = planfile.parse(written(lambda fleet: fleet["devices"][1].pop("bits_per_unit")))
    assert fleet.bits_per_unit.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda f: f.pop("resource"), "resource"),
        (lambda f: f.pop("blocks"), "blocks"),
        (lambda f: f.update(devices={}), "devices"),
        (lambda f: f.update(device=[]), "device"),
        (lambda f: f["resource"].pop("total"), "resource.total"),
        (lambda f: f["resource"].update(total=math.nan), "resource.total"),
        (lambda f: f["resource"].update(total=-1), "resource.total"),
        (lambda f: f["resource"].update(total=True), "resource.total"),
        (lambda f: f["resource"].update(total="2e7"), "resource.total"),
        (lambda f: f["resource"].update(total=10**400), "resource.total"),
        (lambda f: f["resource"].update(kind="Hz"), "resource.kind"),
        (lambda f: f["resource"].update(kind=["hz"]), "resource.kind"),
        (lambda f: f["blocks"].__setitem__(1, 7), "blocks[1]"),
        (lambda f: f["blocks"][1].update(name="layer.1"), "blocks[1].name"),
        (lambda f: f["blocks"][1].update(name=""), "blocks[1].name"),
        (lambda f: f["blocks"][1].update(name="a\nb"), "blocks[1].name"),
        (lambda f: f["blocks"][1].update(name="\ud800"), "blocks[1].name"),
        (lambda f: f["blocks"][0].update(payload_bits=math.inf), "blocks[0].payload_bits"),
        (lambda f: f["blocks"][0].update(payload_bits=None), "blocks[0].payload_bits"),
        (lambda f: f["blocks"][0].update(rounds_since_trained=-1), "blocks[0].rounds_since_trained"),
        (lambda f: f["blocks"].append({"name": "layer.x", "payload_bits": 1}), "devices[0].ready_seconds"),
        (lambda f: f["devices"][1].update(name="pi-1"), "devices[1].name"),
        (lambda f: f["devices"][1].update(name=3), "devices[1].name"),
        (lambda f: f["devices"][0].pop("name"), "devices[0].name"),
        (lambda f: f["devices"][0].pop("fits"), "devices[0].fits"),
        (lambda f: f["devices"][0].pop("bits_per_unit"), "devices[0].bits_per_unit"),
        (lambda f: f["devices"][0].update(ready_seconds=[1.0]), "devices[0].ready_seconds"),
        (lambda f: f["devices"][0].update(ready_seconds=[1.0, math.nan]), "devices[0].ready_seconds[1]"),
        (lambda f: f["devices"][0].update(ready_seconds=[1.0, -2]), "devices[0].ready_seconds[1]"),
        (lambda f: f["devices"][0].update(ready_seconds=[1.0, 1e300]), "devices[0].ready_seconds[1]"),
        (lambda f: f["devices"][0].update(ready_seconds=[1.0, [2]]), "devices[0].ready_seconds[1]"),
        (lambda f: f["devices"][0].update(ready_seconds=4), "devices[0].ready_seconds"),
        (lambda f: f["devices"][0].update(fits=[True, 1]), "devices[0].fits[1]"),
        (lambda f: f["devices"][0].update(fits=[True, True, True]), "devices[0].fits"),
        (lambda f: f["devices"][0].update(max_share=-0.5), "devices[0].max_share"),
        (lambda f: f["devices"][0].update(max_share=math.nan), "devices[0].max_share"),
        (lambda f: f["devices"][0].update(snr_hz=math.nan), "devices[0].snr_hz"),
        (lambda f: f["devices"][0].update(bits_per_unit=1e-300), "devices[0].bits_per_unit"),
        (lambda f: f["devices"][0].update(max_shares=1), "devices[0].max_shares"),
        (lambda f: f["devices"][0].update({"a b": 1}), 'devices[0]["a b"]'),
    ],
)
def test_what_is_wrong_is_named_by_its_path(change: Change, path: str) -> None:
    assert path in complaints(written(change))


def test_every_mistake_is_named_at_once() -> None:
    def spoil(fleet: dict[str, Any]) -> None:
        fleet["resource"]["total"] = math.nan
        fleet["blocks"][0]["payload_bits"] = -1
        fleet["devices"][0]["fits"] = [True]
        fleet["devices"][1]["name"] = "pi-1"

    assert set(complaints(written(spoil))) == {"resource.total", "blocks[0].payload_bits", "devices[0].fits", "devices[1].name"}


def test_a_misspelt_name_is_guessed() -> None:
    assert "did you mean max_share?" in complaints(written(lambda fleet: fleet["devices"][0].update(max_shares=1)))["devices[0].max_shares"]


def test_a_name_that_stands_twice_in_an_object_is_refused() -> None:
    content = written().replace(b'"kind": "bit/s"', b'"kind": "bit/s", "total": 5')
    assert "twice" in complaints(content)["resource.total"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b"\xff\xfe",
        b"[" * 5_000,
        b"[" * 30_000 + b"]" * 30_000,
        b"[" * 1_000_000,
        b'{"resource": ' + b"9" * 5_000 + b"}",
        b"[" + b"0," * 4_000_000 + b"0]",
        b" " * (planfile.FILE_BYTES_MAX + 1),
    ],
    ids=["empty", "cut", "array", "word", "not utf-8", "deep", "deep and closed", "deeper", "digits", "long", "huge"],
)
def test_what_is_no_fleet_is_refused_as_a_whole(content: bytes) -> None:
    assert "" in complaints(content)


def test_too_many_blocks_devices_and_pairs_are_refused() -> None:
    block = {"payload_bits": 1}
    many = [{"name": f"b{index}", **block} for index in range(planfile.BLOCKS_MAX + 1)]
    assert "blocks" in complaints(written(lambda fleet: fleet.update(blocks=many)))
    device = {"ready_seconds": [], "fits": [], "bits_per_unit": 1}
    crowd = [{"name": f"d{index}", **device} for index in range(planfile.DEVICES_MAX + 1)]
    assert "devices" in complaints(written(lambda fleet: fleet.update(devices=crowd)))
    fewer = {"blocks": many[:-1], "devices": crowd[: planfile.PAIRS_MAX // planfile.BLOCKS_MAX + 1]}
    assert "devices" in complaints(written(lambda fleet: fleet.update(fewer)))


def test_complaints_are_bounded() -> None:
    assert len(complaints(written(lambda fleet: fleet.update(blocks=[0] * 900)))) <= planfile.COMPLAINTS_MAX


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the fleet file"):
        planfile.load(tmp_path / "none.json")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_json_is_read_or_complained_about(document: object) -> None:
    for place in ("resource", "blocks", "devices"):
        content = json.dumps({**FLEET, place: document}).encode()
        with contextlib.suppress(FleetFileError):
            planfile.parse(content)
