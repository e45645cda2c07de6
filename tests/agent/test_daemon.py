"""The whole agent as a process with its real training child, against a coordinator that cuts and kills."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from fleetune.v1 import fleet_pb2, messages_pb2
from support.agent_process import PATIENT_PROGRAM, WAIT_S, agent
from support.fake_coordinator import FakeCoordinator, echo_task, state_bytes

pytestmark = pytest.mark.e2e


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    await fake.start()
    yield fake
    await fake.stop()


def values(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    return np.frombuffer(data[header_bytes:], "<f4")


def outbox_rows(state_dir: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(state_dir / "outbox" / "outbox.sqlite") as connection:
        rows = connection.execute("SELECT task_id, kind FROM results").fetchall()
    connection.close()
    return rows


async def test_echo_tasks_come_back_with_their_constant_and_the_outbox_is_empty_after(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    state = coordinator.add_blob(state_bytes(300_000))
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        for number in (1, 2, 3):
            coordinator.send(task=echo_task(f"t{number}", state, constant=number))
        await coordinator.until(lambda: len(coordinator.finished()) == 3)
        # The state was fetched once, and all three were done by one child.
        assert len(coordinator.downloads) == 1
        assert len(running.children()) == 1
        # A result whose receipt is still on its way would rightly be kept for the next start.
        await running.logged("receipt task=t3")
        assert await running.end(signal.SIGTERM) == 0
    for number in (1, 2, 3):
        assert set(values(bytes(coordinator.updates[f"t{number}"].data))) == {np.float32(number)}
    assert outbox_rows(tmp_path / "one") == []
    assert list((tmp_path / "one" / "outbox").glob("*.safetensors")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stopped_agent_says_goodbye_leaves_no_process_and_prints_no_trace(
    coordinator: FakeCoordinator, tmp_path: Path, number: signal.Signals
) -> None:
    state = coordinator.add_blob(state_bytes(1000))
    async with agent(tmp_path / "one", coordinator.address, program=PATIENT_PROGRAM) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state))
        await coordinator.until(lambda: bool(coordinator.finished()))
        children = running.children()
        assert children
        assert await running.end(number) == 0
        await coordinator.until(lambda: coordinator.leaving == ["the agent is being stopped"])
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in running.log


async def test_an_agent_killed_after_training_delivers_its_update_when_it_is_back(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    state = coordinator.add_blob(state_bytes(500_000))
    coordinator.upload_abort = None
    coordinator.cut_uploads = [200_000] + [0] * 100
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state, constant=5))
        await coordinator.until(lambda: len(coordinator.cut_uploads) < 100)
        children = running.children()
        await running.end(signal.SIGKILL)
        # The child goes with its parent: nothing trains for nobody.
        await asyncio.to_thread(psutil.wait_procs, children, WAIT_S)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        coordinator.cut_uploads = []
        await running.start()
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
    held = coordinator.hellos[-1].held
    assert [(task.task_id, task.stage) for task in held] == [("t1", fleet_pb2.HELD_STAGE_FINISHED)]
    assert set(values(bytes(coordinator.updates["t1"].data))) == {np.float32(5)}
    assert coordinator.hellos[0].instance_id != coordinator.hellos[-1].instance_id
    assert coordinator.hellos[0].device_id == coordinator.hellos[-1].device_id


async def test_an_agent_killed_mid_task_does_not_claim_the_task_and_does_it_when_asked_again(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    state = coordinator.add_blob(state_bytes(2_000_000))
    coordinator.cut_downloads = [500_000] + [0] * 1000
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state))
        await coordinator.until(lambda: len(coordinator.downloads) >= 2)
        await running.end(signal.SIGKILL)
        coordinator.cut_downloads = []
        await running.start()
        await coordinator.until(lambda: coordinator.sessions == 2)
        assert list(coordinator.hellos[-1].held) == []
        coordinator.send(task=echo_task("t1", state, lease=2))
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
    # What had arrived before the kill was not fetched again.
    assert coordinator.downloads[-1].offset > 0


async def test_a_damaged_update_is_reported_as_a_failure_after_the_restart(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    state = coordinator.add_blob(state_bytes(500_000))
    coordinator.cut_uploads = [0] * 100
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state))
        await coordinator.until(lambda: len(coordinator.cut_uploads) < 100)
        await running.end(signal.SIGKILL)
        (file,) = (tmp_path / "one" / "outbox").glob("*.safetensors")
        os.truncate(file, 1000)
        await running.start()
        await coordinator.until(lambda: bool(coordinator.outcomes))
        await running.logged("receipt task=t1")
        await running.end(signal.SIGTERM)
    failure = coordinator.outcomes[0].failure
    assert failure.kind == messages_pb2.FAILURE_KIND_TRANSFER
    assert "damaged" in failure.message
    assert coordinator.finished() == []
    assert outbox_rows(tmp_path / "one") == []


async def test_a_child_that_is_killed_is_reported_and_the_next_task_gets_a_new_one(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    small, large = coordinator.add_blob(state_bytes(1000)), coordinator.add_blob(state_bytes(64_000_000))
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", small))
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
        (child,) = running.children()
        child.suspend()
        coordinator.send(task=echo_task("t2", large))
        # A stopped child answers nothing; said right before the task is handed to it.
        await running.logged("inputs ready task=t2")
        child.kill()
        await coordinator.until(lambda: bool(coordinator.outcomes))
        coordinator.send(task=echo_task("t3", small))
        await coordinator.until(lambda: coordinator.finished() == ["t1", "t3"])
    failure = coordinator.outcomes[0].failure
    assert coordinator.outcomes[0].task_id == "t2"
    assert failure.kind == messages_pb2.FAILURE_KIND_CRASH
    assert "SIGKILL" in failure.message


async def test_a_cancelled_task_ends_its_child_and_sends_nothing(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    small, large = coordinator.add_blob(state_bytes(1000)), coordinator.add_blob(state_bytes(8_000_000))
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", small))
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
        (child,) = running.children()
        child.suspend()
        coordinator.send(task=echo_task("t2", large))
        await running.logged("inputs ready task=t2")  # right before it is handed to the child
        coordinator.send(cancel=fleet_pb2.CancelTask(task_id="t2", reason="the round is over"))
        coordinator.send(task=echo_task("t3", small))
        await coordinator.until(lambda: coordinator.finished() == ["t1", "t3"])
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert coordinator.outcomes == []
    assert not any(path.stat().st_size > 7_000_000 for path in (tmp_path / "one" / "outbox").glob("*.safetensors"))


async def test_outcomes_are_repeated_at_every_connect_until_their_receipt(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.sends_receipts = False
    async with agent(tmp_path / "one", coordinator.address) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", messages_pb2.BlobRef(digest="0" * 64, size_bytes=100)))
        await coordinator.until(lambda: len(coordinator.outcomes) == 1)
        coordinator.hang_up()
        await coordinator.until(lambda: len(coordinator.outcomes) == 2)
        coordinator.sends_receipts = True
        await running.end(signal.SIGKILL)
        await running.start()
        await coordinator.until(lambda: len(coordinator.outcomes) == 3)
    assert {outcome.failure.kind for outcome in coordinator.outcomes} == {messages_pb2.FAILURE_KIND_TRANSFER}
    assert "NOT_FOUND" in coordinator.outcomes[0].failure.message


async def test_data_that_the_device_does_not_have_is_a_failure_that_names_what_it_has(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello", "label": "greeting"}\n')
    task = echo_task("t1", coordinator.add_blob(state_bytes(1000)))
    task.recipe.data.name = "intents"
    panel = ("--set", f"data.panel.validation={rows}")
    async with agent(tmp_path / "one", coordinator.address, "--data", f"greetings={rows}", *panel):
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=task)
        await coordinator.until(lambda: bool(coordinator.outcomes))
    failure = coordinator.outcomes[0].failure
    assert failure.kind == messages_pb2.FAILURE_KIND_DATA
    assert "'intents'" in failure.message
    assert "greetings" in failure.message
    hello = coordinator.hellos[0]
    assert list(hello.data_names) == ["greetings", "panel"]
    assert (list(hello.train_data_names), list(hello.validation_data_names)) == (["greetings"], ["panel"])


async def test_an_owner_s_limit_refuses_tasks(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    # One minute of the day that is not now, so that the device is outside its hours.
    import datetime

    hour = (datetime.datetime.now().hour + 12) % 24
    async with agent(tmp_path / "one", coordinator.address, "--set", f"limits.hours={hour:02}:00-{hour:02}:01"):
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", coordinator.add_blob(state_bytes(1000))))
        await coordinator.until(lambda: bool(coordinator.outcomes))
    assert not coordinator.hellos[0].availability.accepts_tasks
    assert "outside" in coordinator.outcomes[0].refusal.reason


async def test_a_second_agent_on_the_same_state_folder_ends_with_its_own_exit_code(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    async with agent(tmp_path / "one", coordinator.address) as first:
        await coordinator.until(lambda: coordinator.sessions == 1)
        async with agent(tmp_path / "one", coordinator.address) as second:
            assert await second.ended() == 5
        assert first.process is not None
        assert f"in use by process {first.process.pid}" in first.log


async def test_exit_codes_tell_refused_from_unreachable(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.refusals = [fleet_pb2.Refusal(kind=fleet_pb2.REFUSAL_KIND_PROTOCOL, message="protocol 1.0 is needed")]
    async with agent(tmp_path / "one", coordinator.address) as refused:
        assert await refused.ended() == 4
        assert "protocol 1.0 is needed" in refused.log
        assert "Traceback" not in refused.log
    await coordinator.stop()
    async with agent(tmp_path / "two", coordinator.address, "--connect-timeout-s", "0.5") as unreachable:
        assert await unreachable.ended() == 3
        assert "Traceback" not in unreachable.log


def test_the_idle_daemon_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; import fleetune.agent.cli, fleetune.agent.service; "
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft', 'numpy', 'pydantic', 'rich') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(found.stdout) == []


def test_help_and_version_import_no_grpc() -> None:
    code = "import sys; import fleetune.agent.cli; print('grpc' in sys.modules, 'psutil' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "False"]
