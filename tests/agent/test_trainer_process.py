"""The training child from the daemon's side: started once, ended when it only waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from fleetune.agent.trainer.process import Trainer
from fleetune.child.process import ChildDied, ChildError
from support.pinging_child import GATE


@pytest_asyncio.fixture
async def trainer() -> AsyncIterator[Trainer]:
    made = Trainer({})
    yield made
    await made.stop()


async def ping(trainer: Trainer) -> dict[str, object]:
    return await trainer.request("ping", {}, lambda event: None, lambda text: None)


async def until_ended(trainer: Trainer) -> None:
    while trainer.pid is not None:  # noqa: ASYNC110  # nobody announces it
        await asyncio.sleep(0.01)


async def test_requests_go_to_one_child_until_it_is_stopped(trainer: Trainer) -> None:
    trainer.prepare(with_torch=False)
    first, second = await ping(trainer), await ping(trainer)
    assert first["pid"] == second["pid"] == trainer.pid
    await trainer.stop()
    assert (await ping(trainer))["pid"] != first["pid"]


async def test_a_child_at_rest_ends_after_its_time_and_a_new_one_serves_on(trainer: Trainer) -> None:
    before = await ping(trainer)
    trainer.rest(0.0)
    await until_ended(trainer)
    assert (await ping(trainer))["pid"] != before["pid"]


async def test_a_request_while_the_child_is_being_ended_gets_a_new_one(trainer: Trainer) -> None:
    before = await ping(trainer)
    trainer.rest(60.0)
    trainer.relieve()
    assert (await ping(trainer))["pid"] != before["pid"]


async def test_a_task_that_follows_keeps_the_child_warm(trainer: Trainer) -> None:
    before = await ping(trainer)
    trainer.rest(0.0)
    trainer.prepare(with_torch=False)
    assert (await ping(trainer))["pid"] == before["pid"]


async def test_a_task_cancelled_while_the_child_starts_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    trainer = Trainer({"PYTHONPATH": str(Path(__file__).parents[1]), GATE: str(gate)}, module="support.pinging_child")
    trainer.prepare(with_torch=True)
    while (pid := trainer.pid) is None:  # noqa: ASYNC110  # nobody announces it
        await asyncio.sleep(0.01)
    # The first answer of all is still to come.
    first = asyncio.create_task(ping(trainer))
    await asyncio.sleep(0)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    second = asyncio.create_task(ping(trainer))
    await asyncio.sleep(0)
    opened = os.open(gate, os.O_RDWR)
    assert (await second)["pid"] == pid
    os.close(opened)
    await trainer.stop()


async def test_relief_does_not_end_a_child_that_works(trainer: Trainer) -> None:
    asking = asyncio.create_task(ping(trainer))
    await asyncio.sleep(0)
    trainer.relieve()
    assert (await asking)["pid"] == trainer.pid


async def test_an_unknown_request_is_the_child_s_error_and_the_child_lives(trainer: Trainer) -> None:
    with pytest.raises(ChildError):
        await trainer.request("dance", {}, lambda event: None, lambda text: None)
    assert trainer.pid is not None


async def test_a_module_that_is_none_is_a_death_with_its_words() -> None:
    trainer = Trainer({}, module="fleetune.agent.nonsense")
    with pytest.raises(ChildDied) as caught:
        await ping(trainer)
    assert "nonsense" in caught.value.death.stderr_tail
    await trainer.stop()
