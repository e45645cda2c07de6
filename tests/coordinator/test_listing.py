"""What `fleetune devices` says of a device's data."""

from __future__ import annotations

import io

from rich.console import Console

from fleetune.coordinator import listing
from fleetune.v1 import control_pb2 as pb


def printed(*devices: pb.DeviceView) -> str:
    console = Console(width=160, file=io.StringIO(), record=True, color_system=None)
    console.print(listing.devices(devices, now_unix_s=0.0, width=160))
    return console.export_text()


def test_what_a_device_has_no_rows_for_is_said() -> None:
    shelf = pb.DeviceView(name="shelf", data_names=["a", "b", "c"], train_data_names=["a", "c"], validation_data_names=["b", "c"])
    assert "a (train only), b (validation only), c" in printed(shelf)


def test_an_older_coordinator_tells_only_the_names() -> None:
    assert "a, b" in printed(pb.DeviceView(name="shelf", data_names=["a", "b"]))
