"""What one device may take: the bucket of a control stream, which honest agents never notice, and what waits or is shown of each."""

from __future__ import annotations

import grpc
import pytest

from fleetune.coordinator.registry import Greeting, Session
from fleetune.coordinator.rpc import convert, fleet
from fleetune.coordinator.rpc.limits import BURST, MESSAGES_PER_S, PERSISTS_S, Bucket
from fleetune.v1 import control_pb2, fleet_pb2
from fleetune.wire import channel


def test_a_burst_and_then_a_steady_rate_pass_without_a_pause() -> None:
    bucket = Bucket(0.0)
    assert all(bucket.draw(0.0) == 0.0 for _ in range(int(BURST)))
    assert all(bucket.draw(10.0 + n / MESSAGES_PER_S) == 0.0 for n in range(100_000))
    assert not bucket.floods(10_000.0)


def test_who_sends_faster_is_read_at_the_rate_and_no_faster() -> None:
    bucket, now, read = Bucket(0.0), 0.0, 0
    while now < 100.0:
        now += bucket.draw(now)
        read += 1
    assert BURST + 99 * MESSAGES_PER_S < read < BURST + 101 * MESSAGES_PER_S


def test_only_who_goes_on_floods() -> None:
    bucket, now = Bucket(0.0), 0.0
    while now < PERSISTS_S / 2:
        now += bucket.draw(now)
    assert not bucket.floods(now)
    now += 10.0  # a pause long enough to fill a good part of the bucket
    bucket.draw(now)
    while now < PERSISTS_S:
        now += bucket.draw(now)
    assert not bucket.floods(now)
    while now < 3 * PERSISTS_S:
        now += bucket.draw(now)
    assert bucket.floods(now)


async def test_a_device_that_reads_nothing_is_cut_with_a_bounded_queue(caplog: pytest.LogCaptureFixture) -> None:
    line = fleet.Line(Session(1, Greeting("device-oak", "oak", "run-1"), True, "", 0.0), fleet_pb2.Hello())
    for number in range(3 * fleet.OUTBOUND_MAX):
        line.send(fleet_pb2.SessionResponse(heartbeat_reply=fleet_pb2.HeartbeatReply(sequence=number)))
    assert len(line.outbound) == fleet.OUTBOUND_MAX
    assert line.cut
    assert line.last_words is not None
    assert line.last_words[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(caplog.records) == 1


def test_devices_that_say_too_much_do_not_keep_an_operator_from_seeing_them_all() -> None:
    views = [control_pb2.DeviceView(device_id=f"device-{n:05d}", name=f"d{n}", online=True, tags=["x" * 200] * 150) for n in range(1000)]
    answer = control_pb2.ListDevicesResponse(devices=convert.fitting(views))
    assert [device.name for device in answer.devices] == [view.name for view in views]
    assert answer.ByteSize() < channel.MESSAGE_BYTES_MAX
    assert all(device.online for device in answer.devices)
