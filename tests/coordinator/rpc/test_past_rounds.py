"""The rounds of a long job fit into an answer, and what is left out is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.coordinator.domain import Blob, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rpc import convert, pastrounds
from fleetune.coordinator.store import records
from fleetune.v1 import control_pb2, messages_pb2
from fleetune.wire import channel
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent
from support.machines import blob

METRICS = {"accuracy": 0.5, "loss": 1.5, "perplexity": 4.5}


def entry(number: int, devices: int) -> RoundEntry:
    made = RoundEntry(number, "committed", 1e9 + number, start_state=blob("s"), state=Blob(f"{number:064x}", 1 << 20), metrics=METRICS)
    made.ended_unix_s = made.started_unix_s + 0.5
    for device in range(devices):
        update = Update(Blob(f"{device:064x}", 1 << 20), 1000, {"loss": 0.5}, {"train": 1.0})
        task = TaskEntry(f"job/{number}/d{device}/train", f"d{device}", f"raspberry-{device:03d}", "train", device + 1, "done")
        task.update = update
        made.tasks[task.task_id] = task
    return made


def view(number: int, devices: int = 4) -> control_pb2.RoundView:
    made = control_pb2.RoundView(round=number, adapter_digest="0" * 64, updates_folded=devices)
    made.tasks.extend(control_pb2.DeviceTask(device_name=f"device-{index}", samples=10) for index in range(devices))
    return made


def fitted(numbers: range, room_bytes: int) -> pastrounds.Fitting:
    fitting = pastrounds.Fitting(room_bytes)
    for number in reversed(numbers):
        if not fitting.add(view(number)):
            break
    return fitting


def test_all_rounds_come_whole_where_there_is_room() -> None:
    fitting = fitted(range(1, 11), 100_000)
    assert [len(found.tasks) for found in fitting.rounds()] == [4] * 10
    assert fitting.tasks_since_round == 0


@pytest.mark.parametrize("room_bytes", [0, 50, 200, 500, 900, 1000, 1300, 1700, 2000])
def test_older_rounds_lose_their_tasks_before_any_round_is_left_out(room_bytes: int) -> None:
    fitting = fitted(range(1, 11), room_bytes)
    found = fitting.rounds()
    assert control_pb2.JobView(history=found).ByteSize() <= room_bytes
    assert [item.round for item in found] == list(range(11 - len(found), 11))
    bare = [item.round for item in found if not item.tasks]
    assert bare == list(range(11 - len(found), fitting.tasks_since_round)) if bare else fitting.tasks_since_round == 0
    if len(found) < 10:
        assert all(not item.tasks for item in found[:-1])


async def test_five_thousand_rounds_of_32_devices_fit_into_one_message(tmp_path: Path) -> None:
    rounds, devices = 5000, 32

    def made() -> Iterator[RoundEntry]:
        return (entry(number, devices) for number in range(1, rounds + 1))

    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "idle", methods=()):
        job = await coordinator.submit(echo_job(rounds=rounds + 1))
        await coordinator.until(job, lambda job: job.machine.status == "waiting")
        job.machine.committed = rounds
        job.history = History.of(made(), {rounds})

        def stored(tx: object) -> None:
            for item in made():
                records.save_round(tx, job.job_id, item)  # type: ignore[arg-type]  # a connection

        await coordinator.engine._database.write(stored)
        answer = await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=job.job_id))
        found = answer.job
        assert answer.ByteSize() < channel.MESSAGE_BYTES_MAX
        assert [item.round for item in found.history] == list(range(1, rounds + 1)), "no round is left out"
        assert 1000 < found.tasks_since_round <= rounds
        assert [bool(item.tasks) for item in found.history] == [item.round >= found.tasks_since_round for item in found.history]
        assert {item.updates_folded for item in found.history} == {devices}
        assert found.upload_bytes == rounds * devices * (1 << 20)
        assert len(job.history) < 10
        early = await coordinator.engine.round_of(job, 17)
        assert early == entry(17, devices)


async def test_a_watcher_is_told_each_round_once(tmp_path: Path) -> None:
    async with coordinating(tmp_path, keep_rounds=1) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.submit(echo_job(rounds=60))
        told: list[list[int]] = []
        committed: list[int] = []
        async for response in coordinator.control.WatchJob(control_pb2.WatchJobRequest(job_id=job.job_id)):
            told.append([item.round for item in response.job.history])
            committed.append(response.job.rounds_committed)
        assert told[0] == []
        assert told[-1] == list(range(1, 61))
        assert [number for numbers in told[1:-1] for number in numbers] == list(range(committed[0] + 1, committed[-2] + 1))


async def test_an_old_round_is_described_as_a_new_one_is(tmp_path: Path) -> None:
    async with coordinating(tmp_path, keep_rounds=20) as coordinator, EchoAgent(coordinator.address, "a") as a:
        a.serve()
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=12)))
        job.history = History.of([], ())
        job.history.committed = 12
        told = await coordinator.control.DescribeAdapter(control_pb2.DescribeAdapterRequest(job_id=job.job_id, round=2))
        assert (told.round, len(told.files)) == (2, 3)


def test_a_round_of_many_failures_fits_beside_the_history() -> None:
    found = control_pb2.RoundView(round=1)
    for index in range(1000):
        task = found.tasks.add(device_name=f"device-{index}")
        task.failure.CopyFrom(messages_pb2.Failure(message="no" * 100, traceback="line\n" * 1000))
    bounded = convert._bounded(found)
    assert bounded.ByteSize() <= convert.CURRENT_BYTES_MAX
    assert len(bounded.tasks) == 1000 and bounded.tasks[0].failure.message
