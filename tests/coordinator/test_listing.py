"""What `fleetune devices` says of a device's data."""

from __future__ import annotations

import io

from rich.console import Console

from fleetune.coordinator import listing
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import fleet_pb2, messages_pb2


def printed(*devices: pb.DeviceView, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(listing.devices(devices, now_unix_s=0.0, width=width))
    return console.export_text()


def test_what_a_device_has_no_rows_for_is_said() -> None:
    shelf = pb.DeviceView(name="shelf", data_names=["a", "b", "c"], train_data_names=["a", "c"], validation_data_names=["b", "c"])
    assert "a (train only), b (validation only), c" in printed(shelf)


def test_an_older_coordinator_tells_only_the_names() -> None:
    assert "a, b" in printed(pb.DeviceView(name="shelf", data_names=["a", "b"]))


def test_a_link_is_shown_with_its_source_and_age_and_a_step_with_its_rows() -> None:
    link = messages_pb2.Link(up_bits_per_s=5.2e6, down_bits_per_s=48e6, round_trip_s=0.008, source="measured", age_s=190)
    figures = messages_pb2.Figures(step_s=[1.2, 1.9], batch_rows=16)
    pi = pb.DeviceView(name="pi", online=True, link=link, figures=figures)
    own = messages_pb2.Link(up_bits_per_s=8e5, metered=True, source="configured")
    text = printed(pi, pb.DeviceView(name="shelf", link=own), pb.DeviceView(name="new"), width=220)
    assert "5.2/48, 8 ms" in text
    assert "measured 3m 10s ago" in text
    assert "1.2 s to 1.9 s, 16 rows" in text
    assert "0.8/?, metered" in text
    assert "configured" in text
    assert "5.2/48, 8 ms" in printed(pi, width=130)
    assert "5.2/48" not in printed(pi, width=100)


def test_a_device_at_work_says_what_it_is_at_and_how_far() -> None:
    task = pb.DeviceTask(
        kind=messages_pb2.TASK_KIND_MEASURE, state=pb.DEVICE_TASK_STATE_ASSIGNED, stage=fleet_pb2.TASK_STAGE_MEASURING, online=True
    )
    task.done, task.total = 2, 5
    pi = pb.DeviceView(name="pi", online=True, task_id="job/1/pi", task=task)
    assert "measuring 40%" in printed(pi, width=80)
    assert "at work" in printed(pb.DeviceView(name="pi", online=True, task_id="of a job that has ended"), width=80)
